"""PruneZeroChannels: channels that are unread or zero, by hand and in attentions, and drawn nets with holes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.errors import TraceError
from fxcompress.passes.pruning import PruneZeroChannels
from tests import contract
from tests.networks import Network
from tests.passes.driver import reasons
from tests.passes.zero_channels import (
    IMAGE,
    Net,
    conv,
    kinds,
    prune,
    punch_holes,
    put,
    residual,
    seq,
    shapes,
    squeeze_excite,
    untouched,
)
from tests.strategies import networks
from tests.zoo import NETS


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- by hand ---


def by_hand() -> Any:
    """Four hidden units on one input x: 3x + 1, which nobody reads; 0; 5, which is read as 2 * 5 and -5; and 2x."""
    model: Any = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [0.0], [0.0], [2.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0, 5.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 7.0, 2.0, 1.0], [0.0, 8.0, -1.0, 3.0]]))
        model[2].bias.copy_(torch.tensor([100.0, 200.0]))
    return model


def test_numbers_by_hand() -> None:
    gm = fxcompress.compile(by_hand(), PruneZeroChannels(), torch.ones(2, 1))
    found = {name: parameter.tolist() for name, parameter in gm.named_parameters()}
    assert found == {"0.weight": [[2.0]], "0.bias": [0.0], "2.weight": [[1.0], [3.0]], "2.bias": [110.0, 195.0]}


def test_the_record_counts_by_kind() -> None:
    gm = fxcompress.compile(by_hand(), "prune-zero-channels", torch.ones(2, 1))
    (record,) = fxcompress.report(gm).to_dict()["passes"]
    assert record["verified"]
    first, last = record["details"]
    assert {"unread": 1, "zero": 1, "constant": 1, "out_features_before": 4, "out_features_after": 1}.items() <= (
        first.items()
    )
    assert {"taken_in": 1, "in_features_before": 4, "in_features_after": 1}.items() <= last.items()


# --- (a) unread ---


def test_what_only_unread_channels_read_is_unread() -> None:
    model = seq(conv(3, 8), nn.ReLU(), conv(8, 8, 3, padding=1), nn.ReLU(), conv(8, 4))
    put(0, model[4].weight[:, :5], model[2].weight[5:, :2])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "2", "4") == [(6, 3), (3, 6), (4, 3)]
    assert kinds(applied) == {"unread": 7}


def test_unread_behind_batch_norm_depthwise_and_pooling() -> None:
    depthwise = conv(6, 6, 3, padding=1, groups=6)
    model = seq(conv(3, 6), nn.BatchNorm2d(6), nn.SiLU(), depthwise, nn.MaxPool2d(2), conv(6, 4))
    put(0, model[5].weight[:, 1:4])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "0", "3", "5") == [(3, 3), (3, 1), (4, 3)]
    assert (gm.get_submodule("1").num_features, gm.get_submodule("3").groups) == (3, 3)


def test_unread_part_of_a_concatenation() -> None:
    model: Any = Net(
        lambda m, x: m.last(torch.cat([m.one(x), m.two(x)], 1)), one=conv(3, 4), two=conv(3, 5), last=conv(9, 2)
    )
    put(0, model.last.weight[:, 3:6])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "one", "two", "last") == [(3, 3), (3, 3), (2, 6)]


def test_unread_in_a_residual_stream_needs_every_reader() -> None:
    model = residual()
    put(0, model.head.weight[:, 2:5], model.body1.weight[:, 3:7])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "stem", "body1", "body2", "head") == [(6, 3), (6, 6), (6, 6), (4, 6)]


def test_a_channel_that_only_feeds_itself_goes() -> None:
    """Through a square layer around which a shortcut leads."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.body(x))

    model: Any = Net(forward, stem=nn.Linear(3, 6), body=nn.Linear(6, 6), head=nn.Linear(6, 2))
    put(0, model.head.weight[:, 1], model.body.weight[:1, 1], model.body.weight[2:, 1])
    gm, _ = prune(model, 2, 3)
    assert shapes(gm, "stem", "body", "head") == [(5, 3), (5, 5), (2, 5)]


def test_squeeze_excite_reads_what_it_pools() -> None:
    model = squeeze_excite()
    put(0, model.last.weight[:, :3])
    assert untouched(model, *IMAGE) == ""
    put(0, model.reduce.weight[:, 1:5])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "first", "reduce", "expand", "last") == [(6, 3), (4, 6), (6, 4), (3, 6)]


USES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "sum": (lambda y: y.sum(1), 6),
    "norm": (lambda y: y.norm(dim=1), 6),
    "mean": (lambda y: y.mean(1), 6),
    "amax": (lambda y: y.amax(1), 6),
    "normalize": (lambda y: F.normalize(y, dim=1)[:, 0], 6),
    "product": (lambda y: y.flatten(2).transpose(1, 2) @ y.flatten(2), 6),
    "einsum": (lambda y: torch.einsum("nchw,ncxy->nhx", y, y), 6),
    "output": (lambda y: y, 6),
    "one of them": (lambda y: y[:, 0], 4),
    "mean in space": (lambda y: y.mean((2, 3))[:, 0], 4),
}


@pytest.mark.parametrize("use", USES)
def test_unread_but_used_otherwise(use: str) -> None:
    function, left = USES[use]

    def forward(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.first(x))
        return m.last(y), function(y)

    model: Any = Net(forward, first=conv(3, 6), last=conv(6, 2))
    put(0, model.last.weight[:, 2:4])
    for graph in (fxcompress.trace(model, torch.randn(*IMAGE)), fx.symbolic_trace(model)):  # of which one knows no F
        gm, _ = prune(graph, *IMAGE)
        assert shapes(gm, "last") == [(2, left)]


# --- (b) zero ---


def test_rows_of_zeros() -> None:
    model = seq(conv(3, 8, bias=False), nn.GELU(), conv(8, 4, 3, padding=1))
    put(0, model[0].weight[2:5])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "2") == [(5, 3), (4, 5)]
    assert kinds(applied) == {"zero": 3}


def test_a_batch_norm_makes_zeros_of_anything() -> None:
    model = seq(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4, 3, padding=1))
    put(0, model[1].weight[:3], model[1].bias[1:5])
    put(0.5, model[1].bias[:1])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "3") == [(6, 3), (4, 6)]
    assert kinds(applied) == {"zero": 2}
    assert reasons(applied) == "1 of the channels that it reads are constant, but it pads with zeros"


def test_zeros_are_constants_behind_a_batch_norm() -> None:
    model = seq(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(), conv(4, 4, 3, padding=1))
    put(0, model[0].weight[1:3])
    assert untouched(model, *IMAGE) == "2 of the channels that it reads are constant, but it pads with zeros"


def test_zero_in_a_residual_stream_needs_every_term() -> None:
    model = residual()
    put(0, model.stem.weight[2:5], model.stem.bias[2:5], model.body2.weight[3:7], model.body2.bias[3:7])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "stem", "body1", "body2", "head") == [(6, 3), (6, 6), (6, 6), (4, 6)]
    assert kinds(applied) == {"zero": 2}


def test_zero_through_squeeze_excite() -> None:
    model = squeeze_excite()
    put(0, model.norm.weight[2:4], model.norm.bias[2:4])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "first", "reduce", "expand", "last") == [(6, 3), (4, 6), (6, 4), (3, 6)]
    assert kinds(applied) == {"zero": 2}


def test_a_sum_loses_zeros() -> None:
    model: Any = Net(lambda m, x: torch.relu(m.first(x)).sum(1), first=conv(3, 6))
    put(0, model.first.weight[1:3], model.first.bias[1:3])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "first") == [(4, 3)]


def test_a_mean_loses_nothing() -> None:
    model: Any = Net(lambda m, x: torch.relu(m.first(x)).mean(1), first=conv(3, 6))
    put(0, model.first.weight[1:3], model.first.bias[1:3])
    assert untouched(model, *IMAGE) == ""


def test_a_norm_over_channels_keeps_all() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(x + m.body(m.norm(x)))

    layers = {"norm": nn.LayerNorm(6), "body": nn.Linear(6, 6), "last": nn.Linear(6, 2)}
    model: Any = Net(forward, first=nn.Linear(3, 6), **layers)
    for made in (model.first, model.body):
        put(0, made.weight[2], made.bias[2])
    put(0, model.body.weight[:, 2], model.last.weight[:, 2], model.norm.weight[2], model.norm.bias[2])
    assert untouched(model, 2, 3) == ""


def test_dead_filters_of_a_depthwise_convolution() -> None:
    """As trained mobile networks have them: behind the batch norm they are constants."""
    depthwise = conv(6, 6, 3, padding=1, groups=6, bias=False)
    model = seq(conv(3, 6), nn.ReLU6(), depthwise, nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 4, bias=False))
    put(0, model[2].weight[1:3], model[3].running_mean[1:3])
    with torch.no_grad():
        model[3].bias[1:3] = torch.tensor([1.0, -1.0])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "2", "5") == [(4, 3), (4, 1), (4, 4)]
    assert kinds(applied) == {"constant": 1, "taken_in": 1, "zero": 1}


def test_grouped_convolutions_lose_whole_groups_or_a_part_of_each() -> None:
    for groups, left in ((4, 6), (2, 6)):
        model = seq(conv(3, 8), conv(8, 8, 3, groups=groups), conv(8, 2))
        width = 8 // groups
        if groups == 4:  # the first group
            put(0, model[2].weight[:, :width], model[0].weight[7], model[0].bias[7])
        else:  # the first of each
            put(0, model[0].weight[::width], model[0].bias[::width], model[2].weight[:, ::width])
        gm, _ = prune(model, *IMAGE)
        assert shapes(gm, "0")[0] == (left, 3)


def test_every_group_keeps_a_channel() -> None:
    model = seq(conv(3, 6), nn.ReLU(), conv(6, 4, bias=False))
    put(0, model[2].weight)
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "0", "2") == [(1, 3), (4, 1)]


# --- attention ---


def attention(fused: bool) -> Any:
    """Three heads of four channels each."""

    def heads(y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], 3, 4).transpose(1, 2)

    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = (heads(layer(x)) for layer in (m.query, m.key, m.value))
        if fused:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            y = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value
        return m.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12))

    layers = {name: nn.Linear(6, 12) for name in ("query", "key", "value")}
    return Net(forward, out=nn.Linear(12, 6, bias=False), **layers)


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_nobody_reads_or_that_are_zero(fused: bool) -> None:
    for unread in (True, False):
        model = attention(fused)
        if unread:
            put(0, model.out.weight[:, 4:8])
        else:
            put(0, model.value.weight[4:8], model.value.bias[4:8])
        gm, _ = prune(model, 2, 5, 6)
        assert shapes(gm, "query", "key", "value", "out") == [(8, 6), (8, 6), (8, 6), (6, 8)]


@pytest.mark.parametrize("fused", [True, False])
def test_parts_of_all_heads(fused: bool) -> None:
    """The scale stays what it was, although heads are narrower."""
    model = attention(fused)
    put(0, model.out.weight[:, 1::4], model.query.weight[2::4], model.query.bias[2::4])
    gm, _ = prune(model, 2, 5, 6)
    assert shapes(gm, "query", "key", "value", "out") == [(9, 6), (9, 6), (9, 6), (6, 9)]


def test_a_head_that_sees_the_same_everywhere() -> None:
    """A mean of equal values is that value, if there is anything to take the mean of."""
    model = attention(fused=True)
    put(0, model.value.weight[4:8])
    gm, applied = prune(model, 2, 5, 6)
    assert shapes(gm, "query", "out") == [(8, 6), (6, 8)]
    assert gm.get_parameter("out.bias").shape == (6,)
    assert kinds(applied)["taken_in"] == 4


def test_a_head_that_may_see_nothing() -> None:
    """Where a mask leaves nothing to see, an attention gives zero."""
    hidden = torch.zeros(5, 5, dtype=torch.bool)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(m.query(x), m.key(x), m.value(x), attn_mask=m.seen)
        return m.out(y)

    model: Any = Net(forward, **{name: nn.Linear(6, 6) for name in ("query", "key", "value", "out")})
    model.register_buffer("seen", hidden)
    put(0, model.value.weight[2:4])
    assert untouched(model, 2, 5, 6) == ""


# --- drawn networks ---


@given(network=networks(dtype=torch.float64), seed=st.integers(0, 999))
def test_drawn_networks_with_holes(network: Network, seed: int) -> None:
    punch_holes(network.module, seed)
    try:
        gm = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    except TraceError:  # zeros may make a network amplify rounding errors beyond what the trace allows itself
        reject()
    options = {"example_inputs": network.args, "example_kwargs": network.kwargs, "verify": False}
    result = fxcompress.compile(gm, PruneZeroChannels(), **options)
    contract.check_outputs(network, result, 1e-10)
    sites = fxcompress.report(result).to_dict()["passes"][-1]["sites"]
    event(f"sites: {sites > 0}")
    again = fxcompress.compile(result, PruneZeroChannels(), **options)
    assert fxcompress.report(again).to_dict()["passes"][-1]["sites"] == 0


@pytest.mark.parametrize("net", ["resnet", "mobilenet", "densenet", "shufflenet", "vit-encoder", "unet", "decoder"])
def test_named_networks_with_holes_keep_the_contract(net: str) -> None:
    network = NETS[net]()
    punch_holes(network.module, seed=0)
    assert contract.check_contract("prune-zero-channels", network)
