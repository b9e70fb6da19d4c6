"""PruneZeroChannels: nets by hand for each kind of channel and each reason to keep one, and drawn nets with holes."""

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
from fxcompress.apply import Applied
from fxcompress.errors import TraceError
from fxcompress.passes.pruning import PruneZeroChannels
from tests import contract
from tests.networks import Network
from tests.passes.driver import apply, error, randomise, reasons
from tests.strategies import networks
from tests.zoo import NETS

EXACT = 1e-12
IMAGE = (2, 3, 6, 6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Named layers, and what to do with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        randomise(self)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def seq(*layers: nn.Module) -> Any:
    return randomise(nn.Sequential(*layers))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def put(value: float, *places: Tensor) -> None:
    """Make slices of parameters this number."""
    with torch.no_grad():
        for place in places:
            place.fill_(value)


def prune(model: nn.Module, *shape: int) -> tuple[fx.GraphModule, Applied]:
    """The pruned graph, in float64 and held against the model on the example and on other values and batch sizes."""
    model = model.double()
    x = torch.randn(*shape, dtype=torch.float64)
    gm = model if isinstance(model, fx.GraphModule) else fxcompress.trace(model, x)
    result, applied = apply(PruneZeroChannels(), gm, x)
    assert error(gm, result, x) < EXACT
    assert error(gm, result, torch.randn(shape[0] + 1, *shape[1:], dtype=torch.float64)) < EXACT
    again, second = apply(PruneZeroChannels(), result, x)
    assert not second.sites
    assert again.code == result.code
    return result, applied


def shapes(gm: nn.Module, *paths: str) -> list[tuple[int, ...]]:
    """Of weights, without kernels."""
    return [tuple(gm.get_parameter(f"{path}.weight").shape[:2]) for path in paths]


def untouched(model: nn.Module, *shape: int) -> str:
    """The refusals of the pass, which must do nothing."""
    _, applied = prune(model, *shape)
    assert not applied.sites
    return reasons(applied)


def kinds(applied: Applied) -> dict[str, int]:
    """How many channels went for each reason, and how many inputs were taken in."""
    found: dict[str, int] = {}
    for site in applied.sites:
        for kind in ("unread", "zero", "constant", "taken_in"):
            if kind in site.detail:
                found[kind] = found.get(kind, 0) + site.detail[kind]
    return found


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


def residual() -> Any:
    """stem -> x + body2(relu(body1(x))) -> head, with eight channels in the stream."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.body2(torch.relu(m.body1(x))))

    return Net(forward, stem=conv(3, 8), body1=conv(8, 6), body2=conv(6, 8), head=conv(8, 4))


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


def squeeze_excite() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.norm(m.first(x)))
        return m.last(x * torch.sigmoid(m.expand(torch.relu(m.reduce(x.mean((2, 3), keepdim=True))))))

    layers = {"norm": nn.BatchNorm2d(8), "reduce": conv(8, 4), "expand": conv(4, 8), "last": conv(8, 3)}
    return Net(forward, first=conv(3, 8), **layers)


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


# --- (c) constant ---

BETWEEN = (nn.Identity, nn.ReLU, nn.Sigmoid, nn.GELU, nn.Hardswish, nn.Softplus, nn.PReLU, nn.Dropout, nn.Tanh)
READERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: conv(6, 4),
    "no padding, no bias": lambda: conv(6, 4, 3, stride=2, bias=False),
    "reflect": lambda: conv(6, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: conv(6, 4, 1, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, padding=2, bias=False),
    "grouped": lambda: nn.Sequential(conv(6, 6, 3, groups=6), conv(6, 4)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("between", BETWEEN)
def test_constants_go_into_the_next_bias(between: type[nn.Module], reader: str) -> None:
    model = seq(conv(3, 6), between(), READERS[reader]())
    put(0, model[0].weight[2:5])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "0") == [(3, 3)]


def test_a_new_bias_trains_if_the_weight_does() -> None:
    for asks in (True, False):
        model = seq(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        model[1].weight.requires_grad_(asks)
        put(0, model[0].weight[1])
        gm, _ = prune(model, 2, 3)
        assert gm.get_parameter("1.bias").requires_grad is asks


def test_a_batch_norm_without_scale_leaves_its_shift() -> None:
    model = seq(conv(3, 6), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 4))
    put(0, model[1].weight[1:3])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "5") == [(4, 3), (4, 36)]
    assert kinds(applied) == {"constant": 2, "taken_in": 18}


UNEVEN = "it is transposed and reaches its outputs unevenly"


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (conv(4, 4, 3, padding=1), "it pads with zeros"),
        (conv(4, 4, 3, padding="same"), "it pads with zeros"),
        (nn.ConvTranspose2d(4, 4, 1, 2), UNEVEN),
        (nn.ConvTranspose2d(4, 4, 3), UNEVEN),
    ],
)
def test_constants_that_no_bias_can_take_in(last: nn.Module, why: str) -> None:
    model = seq(conv(3, 4), nn.Sigmoid(), last)
    put(0, model[0].weight[1:3])
    for shape in (IMAGE, (2, 3, 1, 1)):  # on a single place all places are alike by chance
        assert untouched(model, *shape) == f"2 of the channels that it reads are constant, but {why}"


def test_padding_makes_other_values_of_constants() -> None:
    model = seq(conv(3, 4), nn.Sigmoid(), conv(4, 4, 3, padding=1, bias=False), nn.Sigmoid(), conv(4, 2))
    put(0, model[0].weight[1], model[2].weight[2])
    model[2].weight.data[2, 1] = 1
    assert "it pads with zeros" in untouched(model, *IMAGE)


def test_a_layer_takes_in_constants_and_loses_outputs() -> None:
    model = seq(nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    put(0, model[0].weight[2], model[2].weight[:, 1], model[2].weight[:, 3])
    gm, applied = prune(model, 2, 3)
    assert shapes(gm, "0", "1", "2") == [(5, 3), (3, 5), (2, 3)]
    assert kinds(applied) == {"constant": 1, "taken_in": 1, "unread": 2}


def test_a_constant_below_zero_is_zero_behind_a_relu() -> None:
    model = seq(conv(3, 4), nn.ReLU(), conv(4, 4, 3, padding=1))
    put(0, model[0].weight[1:3])
    put(-1, model[0].bias[1])
    put(1, model[0].bias[2])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "2") == [(3, 3), (4, 3)]
    assert "1 of the channels" in reasons(applied)


def test_a_relu_that_never_fires() -> None:
    """Nothing leaves a ReLU6 above 6 or below 0; nine weights of 0.1 make at most 5.4 of that."""
    model = seq(
        conv(3, 5), nn.ReLU6(), conv(5, 5, 3, padding=1, groups=5), nn.ReLU6(), conv(5, 2, 3, padding=1, bias=False)
    )
    put(-0.1, model[2].weight[0])
    put(0.1, model[2].weight[1:])
    for channel, bias in enumerate((-0.01, -5.5, -5.3, 6.0, 5.9)):
        put(bias, model[2].bias[channel])
    gm, applied = prune(model, *IMAGE)
    assert shapes(gm, "0", "2", "4") == [(3, 3), (3, 1), (2, 3)]  # the fourth is always 6, and meets a border
    assert kinds(applied) == {"zero": 2}
    assert "1 of the channels" in reasons(applied)


def test_beyond_the_border_a_relu_may_fire() -> None:
    """At most 5 - 9 inside, but 5 - 4 in a corner."""
    model = seq(conv(3, 4), nn.Hardtanh(1, 2), conv(4, 4, 3, padding=1, groups=4), nn.ReLU(), conv(4, 2))
    put(-1, model[2].weight[1])
    put(5, model[2].bias[1])
    assert untouched(model, *IMAGE) == ""


def test_a_constant_place_by_place_is_no_constant() -> None:
    """A learned position on top of nothing."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.tanh(m.first(x) + m.place.weight))

    model: Any = Net(forward, first=nn.Linear(3, 6), place=nn.Embedding(5, 6), last=nn.Linear(6, 2))
    put(0, model.first.weight[1:3])
    put(0.5, model.place.weight[:, 2])
    gm, _ = prune(model, 2, 5, 3)
    assert shapes(gm, "first", "place", "last") == [(5, 3), (5, 5), (2, 5)]


# --- shared, tied, in training, in place ---


def test_a_shared_reader_takes_in_what_all_its_calls_agree_on() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.relu(m.one(x))) + m.last(torch.relu(m.two(x)))

    model: Any = Net(forward, one=nn.Linear(3, 6), two=nn.Linear(3, 6), last=nn.Linear(6, 2))
    put(0, model.one.weight[1:4], model.two.weight[1:5])
    for layer, numbers in ((model.one, (1.0, 2.0, -1.0)), (model.two, (1.0, 3.0, -2.0))):
        for i, number in enumerate(numbers):
            put(number, layer.bias[1 + i])
    gm, applied = prune(model, 2, 3)
    assert shapes(gm, "one", "two", "last") == [(4, 3), (4, 3), (2, 4)]  # 1 and 1 are taken in, 0 and 0 dropped
    assert kinds(applied) == {"constant": 1, "zero": 1, "taken_in": 1}


def test_a_shared_layer_behind_itself() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.relu(m.twice(torch.relu(m.twice(m.first(x))))))

    model: Any = Net(forward, first=conv(3, 6), twice=conv(6, 6), last=conv(6, 2))
    put(0, model.twice.weight[2], model.twice.bias[2], model.first.weight[2], model.first.bias[2])
    put(0, model.twice.weight[:, 4], model.last.weight[:, 4])
    gm, _ = prune(model, *IMAGE)
    assert shapes(gm, "first", "twice", "last") == [(4, 3), (4, 4), (2, 4)]


def test_a_tied_bias_takes_nothing_in() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.relu(m.first(x))) + m.other(x)

    model: Any = Net(forward, first=nn.Linear(3, 6), last=nn.Linear(6, 2), other=nn.Linear(3, 2))
    model.other.bias = model.last.bias
    put(0, model.first.weight[1])
    put(1, model.first.bias[1])
    assert "its bias is tied or read elsewhere" in untouched(model, 2, 3)


def test_tied_weights_go_together() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.one_out(torch.relu(m.one(x))) + m.two_out(torch.relu(m.two(x)))

    layers = {"one_out": nn.Linear(6, 2), "two_out": nn.Linear(6, 2)}
    model: Any = Net(forward, one=nn.Linear(3, 6), two=nn.Linear(3, 6), **layers)
    model.two.weight, model.two.bias = model.one.weight, model.one.bias
    put(0, model.one_out.weight[:, 1:3])
    assert untouched(model, 2, 3) == ""
    put(0, model.two_out.weight[:, 2:4])
    gm, _ = prune(model, 2, 3)
    assert shapes(gm, "one", "one_out", "two_out") == [(5, 3), (2, 5), (2, 5)]
    assert gm.get_parameter("one.weight") is gm.get_parameter("two.weight")


def test_a_batch_norm_in_training_mode_is_refused() -> None:
    model = seq(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6), nn.ReLU(), conv(6, 2))
    put(0, model[1].weight[:3], model[1].bias[:3], model[3].weight[:, :3], model[5].weight[:, :2])
    model[3].weight.data.abs_()  # or its ReLU might never fire, behind one
    model[1].train()
    x = torch.randn(*IMAGE)
    gm, applied = apply(PruneZeroChannels(), model, x)
    assert shapes(gm, "0", "3", "5") == [(6, 3), (4, 6), (2, 4)]
    assert reasons(applied) == "it is in training mode; call model.eval() first"


def test_what_is_written_later_is_not_known() -> None:
    """A view of a tensor of zeros that something is added to: in place, and behind the back of its node."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        flat = y.view(y.shape[0], 4, -1)
        y.add_(m.other(x))
        return m.last(flat.view(y.shape))

    model: Any = Net(forward, first=conv(3, 4, bias=False), other=conv(3, 4), last=conv(4, 2))
    put(0, model.first.weight[1:3])
    assert untouched(model, *IMAGE) == ""
    put(0, model.other.weight[2], model.other.bias[2])
    assert untouched(model, *IMAGE) == ""  # known of the sum, but not of what it was written to


def test_a_buffer_that_the_graph_changes_is_no_constant() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("scale", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.first(x) * self.scale)
            self.scale.add_(1)
            return y

    x = torch.randn(2, 3)
    gm, applied = apply(PruneZeroChannels(), fxcompress.trace(Counts().eval(), x), x)
    assert not applied.sites
    assert gm.get_buffer("scale").sum() == 0


def test_a_size_that_is_computed_with_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x))
        return m.last(y.view(y.size(0), y.size(1), -1).sum(-1)) / y.size(1)

    model: Any = Net(forward, first=conv(3, 6), last=nn.Linear(6, 2))
    put(0, model.last.weight[:, :2])
    assert untouched(fx.symbolic_trace(model), *IMAGE) == ""


def test_a_size_that_shapes_something_follows() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x))
        return m.last(y.view(y.shape[0], y.shape[1], -1).sum(-1)) / y.shape[0]

    model: Any = Net(forward, first=conv(3, 6), last=nn.Linear(6, 2))
    put(0, model.last.weight[:, :2])
    gm, _ = prune(fx.symbolic_trace(model), *IMAGE)
    assert shapes(gm, "first", "last") == [(4, 3), (2, 4)]


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


def punch_holes(module: nn.Module, seed: int) -> None:
    """Make random rows and columns of parameters zero, often the same ones in all parameters of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < 0.4

    for layer in module.modules():
        own = [p for p in layer.parameters(recurse=False) if p.dim()]
        rows = some(own[0].shape[0]) if own else torch.zeros(0)
        for parameter in own:
            way = int(torch.randint(4, (1,), generator=generator))
            if way < 2 and len(parameter) == len(rows):
                parameter.data[rows] = 0
            if 0 < way < 3 and parameter.dim() > 1:
                parameter.data[:, some(parameter.shape[1])] = 0


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
