"""PruneZeroChannels: constants, and what must not be taken for one: shared, tied, padded, written to, in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.passes.pruning import PruneZeroChannels
from tests.passes.driver import apply, reasons
from tests.passes.zero_channels import (
    IMAGE,
    Net,
    conv,
    kinds,
    prune,
    put,
    seq,
    shapes,
    untouched,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
