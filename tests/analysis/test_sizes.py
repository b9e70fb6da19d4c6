"""Sizes: what is said to hold for all inputs holds for other inputs, and enough is said."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.shapes import Shapes, TensorSpec, shapes
from fxcompress.analysis.sizes import Sizes
from tests.networks import Network
from tests.strategies import networks


def check(sizes: Sizes, gm: fx.GraphModule, seen: Shapes) -> None:
    """``seen`` is of a run on whatever inputs."""
    for node in gm.graph.nodes:
        if node.op == "output" or not isinstance(spec := seen[node], TensorSpec):
            continue
        for size, actual in zip(sizes[node], spec.shape, strict=True):
            wanted = size if isinstance(size, int) else seen.shape(size[0])[size[1]]
            assert wanted == actual, f"{node.format_node()}: {sizes[node]} but {spec.shape}"


@given(networks(), st.integers(1, 5))
def test_at_other_batch_sizes(network: Network, batch: int) -> None:
    gm = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    sizes = Sizes(gm, shapes(gm, network.args, network.kwargs))
    check(sizes, gm, shapes(gm, *network.fresh(0, batch)))


class Many(nn.Module):
    """The rules, on (N, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.AdaptiveAvgPool2d((None, 2)),
            nn.Linear(2, 5),
        )
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.conv(x)) * self.scale
        rows = torch.flatten(self.pool(y), 2)
        table = y.mean((2, 3))
        return y + y.sigmoid(), rows, self.last(self.pool(y)), table.view(table.size(0), 2, -1), y.sum(1, True)


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 6, 6), (1, 1, 9), (3, 8, 4)])
def test_by_rule(batch: int, height: int, width: int) -> None:
    gm = fx.symbolic_trace(Many())
    sizes = Sizes(gm, shapes(gm, (torch.randn(2, 3, 6, 6),)))
    check(sizes, gm, shapes(gm, (torch.randn(batch, 3, height, width),)))
    node = {n.name: n for n in gm.graph.nodes}
    n = (node["x"], 0)
    conv, pool = node["conv"], node["pool"]
    assert sizes[conv] == (n, 4, (conv, 2), (conv, 3))
    assert sizes[node["mul"]] == sizes[node["add"]] == sizes[node["sigmoid"]] == sizes[conv]
    assert sizes[pool] == (n, 4, (pool, 2), 2)
    assert sizes[node["flatten"]] == (n, 4, (node["flatten"], 2))
    assert sizes[node["last"]][-1] == 5
    assert sizes[node["mean"]] == (n, 4)
    assert sizes[node["view"]] == (n, 2, (node["view"], 2))
    assert sizes[node["sum_1"]] == (n, 1, (conv, 2), (conv, 3))
    assert sizes.asked(node["size"]) == n
    assert sizes.asked(7) == 7
    assert sizes.asked(-1) is None


class Baked(nn.Module):
    """Python computes with the width, so the recorded graph holds for this width alone and checks it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x)) * float(x.shape[3])


def test_guards_of_a_recorded_graph_fix_sizes() -> None:
    gm = fxcompress.trace(Baked(), torch.randn(2, 3, 8, 8))
    sizes = Sizes(gm, shapes(gm, (torch.randn(2, 3, 8, 8),)))
    (batch, *others) = sizes[gm.graph.output_node().all_input_nodes[0]]
    assert others == [4, 3, 3]
    assert isinstance(batch, tuple)


def test_broadcasting_of_ones_claims_nothing_wrong() -> None:
    gm = fx.symbolic_trace(lambda_module(lambda x, y: operator.add(x, y)))
    sizes = Sizes(gm, shapes(gm, (torch.ones(2, 3), torch.ones(1, 3))))
    add = gm.graph.output_node().all_input_nodes[0]
    assert sizes[add] == ((add, 0), (add, 1))


def lambda_module(function: Any) -> nn.Module:
    class Lambda(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return function(x, y)

    return Lambda()
