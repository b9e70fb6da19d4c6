"""One question, one answer, however a graph spells the call."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress import matching


def graph_of(*calls: tuple[str, Any, tuple[Any, ...]], **modules: nn.Module) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``calls`` in turn, each (kind, target, arguments after the first), each reading the one before it."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for kind, target, args in calls:
        nodes.append(graph.create_node(kind, target, (nodes[-1], *args)))
    graph.output(nodes[-1])
    return fx.GraphModule(modules, graph), nodes


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("call_function", torch.add),
        ("call_function", operator.add),
        ("call_function", torch.Tensor.add),
        ("call_function", torch.Tensor.__add__),
        ("call_method", "add"),
        ("call_method", "__add__"),
    ],
)
def test_a_call_by_any_name(kind: str, target: Any) -> None:
    _, (_, node) = graph_of((kind, target, (0,)))
    assert matching.name_of_call(node) == "add"
    assert matching.is_call(node, {"add"})
    assert matching.is_torch_call(node)


def add(x: Any, y: Any) -> Any:
    """Somebody else's function of that name."""
    return x


def test_a_function_from_elsewhere_is_not_it() -> None:
    _, (_, node) = graph_of(("call_function", add, (0,)))
    assert matching.name_of_call(node) == ""
    assert not matching.is_torch_call(node)


class MyReLU(nn.ReLU):
    """A subclass."""


def test_called_wants_the_exact_type() -> None:
    modules = {"a": nn.ReLU(), "b": MyReLU()}
    gm, (x, a, b) = graph_of(("call_module", "a", ()), ("call_module", "b", ()), **modules)
    assert matching.called(gm, a, nn.ReLU, nn.GELU) is gm.get_submodule("a")
    assert matching.called(gm, b, nn.ReLU) is None
    assert matching.called(gm, x, nn.ReLU) is None
    assert matching.called(gm, 3, nn.ReLU) is None
    assert not matching.is_torch_call(b)


def test_arguments_by_position_and_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(F.dropout, (), {"input": x, "p": 0.25})
    assert matching.tensor_input(node) is x
    assert matching.argument(node, 1, "p", 0.5) == 0.25
    assert matching.argument(node, 2, "training", True) is True
    assert matching.tensor_input(graph.call_function(torch.add, (1, x))) is None


def test_descriptions() -> None:
    gm, (x, a, b, c) = graph_of(
        ("call_module", "relu", ()), ("call_function", F.gelu, ()), ("call_function", add, (1,)), relu=nn.ReLU()
    )
    assert matching.describe(gm, x) == "the model's input 'x'"
    assert matching.describe(gm, a) == "ReLU 'relu'"
    assert matching.describe(gm, b) == "gelu (node 'gelu')"
    assert matching.describe(gm, c) == "add (node 'add')"
    assert matching.describe(gm, gm.graph.output_node()) == "the model's output"
    assert matching.describe(gm, 3) == "the constant 3"


KEEPING = [nn.ReLU(), nn.Dropout(), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.Softmax(1), nn.Identity(), nn.PReLU()]


@pytest.mark.parametrize("module", [*KEEPING, nn.GLU(1), nn.Conv2d(2, 2, 1), nn.AvgPool2d(1)], ids=repr)
def test_keeps_shape(module: nn.Module) -> None:
    gm, (_, node) = graph_of(("call_module", "m", ()), m=module)
    assert matching.keeps_shape(gm, node) == (module in KEEPING)
    if module in KEEPING:
        assert gm(torch.randn(2, 2, 3, 3)).shape == (2, 2, 3, 3)


def memory(*calls: tuple[str, Any, tuple[Any, ...]], **modules: nn.Module) -> str | None:
    """Whether the clone in the middle of ``calls`` is needed."""
    gm, nodes = graph_of(*calls, **modules)
    copy = next(node for node in nodes if node.target == "clone")
    return matching.Memory(gm, lambda node: True).obstacle_to_sharing(copy, copy.all_input_nodes[0])


CLONE, RELU = ("call_method", "clone", ()), ("call_function", torch.relu, ())


@pytest.mark.parametrize(
    "writer",
    [
        ("call_method", "add_", (1,)),
        ("call_function", operator.iadd, (1,)),
        ("call_function", torch.ops.aten.add_.Scalar, (1,)),
        ("call_function", operator.setitem, (0, 1)),
        ("call_function", add, (1,)),
        ("call_module", "m", ()),
    ],
    ids=repr,
)
def test_writers(writer: Any) -> None:
    modules = {"m": nn.ReLU(inplace=True)} if writer[0] == "call_module" else {}
    view = ("call_method", "view", (-1,))
    assert "may write" in (memory(RELU, CLONE, view, writer, **modules) or "")
    assert memory(RELU, CLONE, RELU, writer, **modules) is None, "what relu returns is its own"
    assert memory(writer, RELU, CLONE, RELU, **modules) is None, "that was before the copy"


def test_sums_of_lists_share_with_their_terms() -> None:
    gm, nodes = graph_of(RELU, CLONE, ("call_function", operator.add, ([],)), ("call_method", "zero_", ()))
    assert matching.Memory(gm, lambda node: True).obstacle_to_sharing(nodes[2], nodes[1]) is None
    assert matching.Memory(gm, lambda node: False).obstacle_to_sharing(nodes[2], nodes[1]) is not None
