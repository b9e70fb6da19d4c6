"""What is said to be sure of the values of a graph is so, and so are the bounds: each element, on other inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress.errors import TraceError
from fxcompress.passes.pruning.known import Known
from fxcompress.passes.pruning.known_running import KnownRunner, constants_of
from tests.networks import Network
from tests.passes.zero_channels import punch_holes
from tests.strategies import networks


class Checked(KnownRunner):
    """Holds what is known of each value against the value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            known = pytree.tree_leaves(self.known[n], is_leaf=lambda v: isinstance(v, Known))
            for found, said in zip(pytree.tree_leaves(value), known, strict=True):
                if isinstance(found, Tensor):
                    self.check(n, found, said)
        return value

    @staticmethod
    def check(n: fx.Node, found: Tensor, said: Known) -> None:
        assert said.shape == tuple(found.shape), n.format_node()
        sure, value = said.expanded()
        assert torch.allclose(found.double()[sure], value.double()[sure], 1e-9, 1e-9), n.format_node()
        low, high = said.range
        slack = 1e-9 * (1 + found.double().abs())
        assert bool(((low - slack <= found) & (found <= high + slack)).all()), f"bounds of {n.format_node()}"


@given(network=networks(dtype=torch.float64), seed=st.integers(0, 999))
def test_drawn_networks(network: Network, seed: int) -> None:
    punch_holes(network.module, seed)
    try:
        gm = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    except TraceError:  # zeros may make a network amplify rounding errors beyond what the trace allows itself
        reject()
    first = constants_of(gm, network.args, network.kwargs)
    event(f"constants: {sum(k.any for k in first.known.values() if isinstance(k, Known)) // 10}0")
    for args, kwargs in (network.fresh(11), network.fresh(12, network.batch + 2)):
        Checked(gm, first.changed).observe(args, kwargs)


def test_bounds_of_averages() -> None:
    """Zeros beyond the border count, unless told otherwise, and a sum is no average."""
    for options, least in (({}, 0), ({"padding": 1}, 0), ({"divisor_override": 1}, None)):
        gm = fx.symbolic_trace(nn.Sequential(nn.Hardtanh(1, 2), nn.AvgPool2d(3, 1, **options), nn.Hardtanh(0.5, 1)))
        runner = Checked(gm)
        runner.observe((torch.randn(1, 2, 5, 5),))
        pooled, last = (next(iter(gm.graph.find_nodes(op="call_module", target=t))) for t in "12")
        assert (runner.known[pooled].bounds is None) == (least is None)
        assert not runner.known[last].any


# --- single rules ---

CONSTANT = torch.tensor([0.0, 0.0, -2.0, 1.5])


class Channels(nn.Module):
    """Four channels of x, of which the last three are made 0, -2 and 1.5, and then an operation."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1))
        self.register_buffer("constant", CONSTANT.view(1, 4, 1, 1).clone())

    def forward(self, x: Tensor) -> Any:
        return self.operation(x * self.mask + self.constant, x)


# What is sure of the channels of the result: None for nothing.
RULES: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[float | None]]] = {
    "relu": (lambda y, x: y.relu(), [None, 0, 0, 1.5]),
    "sum": (lambda y, x: y + y.abs(), [None, 0, 0, 3]),
    "number": (lambda y, x: 2 * y - 1, [None, -1, -5, 2]),
    "product": (lambda y, x: y * x, [None, 0, None, None]),
    "batch size": (lambda y, x: y / x.shape[0], [None, None, None, None]),
    "times batch size": (lambda y, x: y * x.shape[0], [None, 0, None, None]),
    "where": (lambda y, x: torch.where(x > 0, y, y * y.sign().abs()), [None, 0, -2, 1.5]),
    "masked_fill": (lambda y, x: y.masked_fill(x > 0, 0.0), [None, 0, None, None]),
    "where constant": (lambda y, x: torch.where(y > 1, y, -y), [None, 0, 2, 1.5]),
    "dropout": (lambda y, x: F.dropout(y, 0.5, training=True), [None, 0, None, None]),
    "no dropout": (lambda y, x: F.dropout(y, 0.5, training=False), [None, 0, -2, 1.5]),
    "random": (lambda y, x: torch.rand_like(y), [None, None, None, None]),
    "tril": (lambda y, x: y.tril(), [None, None, None, None]),
    "max_pool": (lambda y, x: F.max_pool2d(y, 3, 1, 1), [None, 0, -2, 1.5]),
    "avg_pool": (lambda y, x: F.avg_pool2d(y, 2), [None, 0, -2, 1.5]),
    "padded avg_pool": (lambda y, x: F.avg_pool2d(y, 3, 1, 1), [None, 0, None, None]),
    "interpolate": (lambda y, x: F.interpolate(y, scale_factor=2, mode="bilinear"), [None, 0, -2, 1.5]),
    "pad": (lambda y, x: F.pad(y, (1, 1)), [None, 0, None, None]),
    "pad with a number": (lambda y, x: F.pad(y, (1, 1), value=-2.0), [None, None, -2, None]),
    "pad channels": (lambda y, x: F.pad(y, (0, 0, 0, 0, 1, 0)), [None, None, None, None, None]),
    "reflect": (lambda y, x: F.pad(y, (1, 1, 1, 1), mode="reflect"), [None, 0, -2, 1.5]),
    "mean": (lambda y, x: y.mean((2, 3), keepdim=True), [None, 0, -2, 1.5]),
    "total": (lambda y, x: y.sum((2, 3), keepdim=True), [None, 0, None, None]),
    "cat": (lambda y, x: torch.cat([y[:, 2:], x[:, :2]], 1), [-2, 1.5, None, None]),
    "flip": (lambda y, x: y.flip(1), [1.5, -2, 0, None]),
    "shuffle": (lambda y, x: F.channel_shuffle(y, 2), [None, -2, 0, 1.5]),
    "there and back": (lambda y, x: y.flatten(2).transpose(1, 2).mT.view(y.shape), [None, 0, -2, 1.5]),
    "places of its own": (lambda y, x: y + torch.arange(3.0), [None, None, None, None]),
    "zeros": (lambda y, x: torch.zeros_like(y) + x.new_ones(x.shape), [1, 1, 1, 1]),
    "clamp": (lambda y, x: x.clamp(2, 3).clamp(max=1), [1, 1, 1, 1]),
    "times zero": (lambda y, x: (x.sigmoid() + 1).clamp(min=0.5) * 0, [None, None, None, None]),
    "in place": (lambda y, x: y.add_(1).relu_(), [None, 1, 0, 2.5]),
    "bounds": (lambda y, x: y.clamp(-3, 3).sigmoid().add(y.relu()).clamp(max=0.1), [None, 0.1, 0.1, 0.1]),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    operation, expected = RULES[rule]
    gm = fx.symbolic_trace(Channels(operation).double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runner = Checked(gm)
    runner.observe((x,))
    (output,) = gm.graph.find_nodes(op="output")
    along = runner.known[output.all_input_nodes[0]].along(1)
    found = [v if sure else None for v, sure in zip(along.value.tolist(), along.sure.tolist(), strict=True)]
    assert found == pytest.approx(expected)
