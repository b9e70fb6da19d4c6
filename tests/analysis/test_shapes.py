"""Shapes and dtypes of a graph's values."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxcompress.analysis import TensorSpec, shapes
from fxcompress.errors import FxCompressError, UsageError

CPU = torch.device("cpu")


class Example(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x))
        first, second = y.chunk(2, dim=1)
        z = first.reshape(y.size(0), -1)
        return {"z": z, "double": second.double()}


def nodes_by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


def test_by_hand() -> None:
    gm = fx.symbolic_trace(Example())
    nodes, found = nodes_by_name(gm), shapes(gm, (torch.randn(2, 3, 9, 9),))
    half = TensorSpec((2, 2, 4, 4), torch.float32, CPU)
    assert found.shape(nodes["x"]) == (2, 3, 9, 9)
    assert found.shape(nodes["conv"]) == (2, 4, 4, 4)
    assert found[nodes["norm"]] == TensorSpec((2, 4, 4, 4), torch.float32, CPU)
    assert found[nodes["chunk"]] == (half, half)
    assert found[nodes["size"]] == 2
    assert found.shape(nodes["reshape"]) == (2, 32)
    assert found.dtype(nodes["double"]) is torch.float64
    assert found[nodes["output"]]["z"].shape == (2, 32)


def test_inputs_by_keyword() -> None:
    gm = fx.symbolic_trace(Example())
    assert shapes(gm, (), {"x": torch.randn(1, 3, 5, 5)}).shape(nodes_by_name(gm)["conv"]) == (1, 4, 2, 2)


def test_no_tensor_is_an_error_that_names_the_node() -> None:
    gm = fx.symbolic_trace(Example())
    nodes, found = nodes_by_name(gm), shapes(gm, (torch.randn(1, 3, 5, 5),))
    with pytest.raises(FxCompressError, match=r"'size'.* is a int"):
        found.shape(nodes["size"])
    with pytest.raises(FxCompressError, match=r"'chunk'.* is a "):
        found.dtype(nodes["chunk"])


def test_a_node_that_came_later_is_an_error() -> None:
    gm = fx.symbolic_trace(Example())
    found = shapes(gm, (torch.randn(1, 3, 5, 5),))
    with gm.graph.inserting_before(nodes_by_name(gm)["output"]):
        late = gm.graph.call_method("neg", (nodes_by_name(gm)["conv"],))
    assert nodes_by_name(gm)["conv"] in found
    assert late not in found
    with pytest.raises(UsageError, match="'neg'"):
        found[late]


def test_module_in_training_mode_stays_as_it_was() -> None:
    gm = fx.symbolic_trace(Example()).train()
    before, random_state = copy.deepcopy(gm.state_dict()), torch.get_rng_state()
    shapes(gm, (torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)),))
    assert gm.training
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_shape_before_an_in_place_change() -> None:
    gm = fx.symbolic_trace(lambda x: x.clone().unsqueeze_(0))
    nodes = nodes_by_name(gm)
    found = shapes(gm, (torch.randn(3),))
    assert found.shape(nodes["clone"]) == (3,)
    assert found.shape(nodes["unsqueeze_"]) == (1, 3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.int64, torch.bool]))
def test_agrees_with_the_output(size: list[int], dtype: torch.dtype) -> None:
    gm = fx.symbolic_trace(lambda x: x.movedim(0, -1).unsqueeze(1))
    x = torch.zeros(size, dtype=dtype)
    output = gm(x)
    spec = shapes(gm, (x,))[next(iter(reversed(gm.graph.nodes)))]
    assert spec == TensorSpec(tuple(output.shape), output.dtype, output.device)
