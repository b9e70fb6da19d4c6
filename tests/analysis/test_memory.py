"""Memory: a copy is needed if somebody writes to it or to its original, or counts on its strides."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress.analysis.memory import Memory
from fxcompress.modules import ScaledDotProductAttention


def graph_of(*calls: tuple[str, Any, tuple[Any, ...]], **modules: nn.Module) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``calls`` in turn, each (kind, target, arguments after the first), each reading the one before it."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for kind, target, args in calls:
        nodes.append(graph.create_node(kind, target, (nodes[-1], *args)))
    graph.output(nodes[-1])
    return fx.GraphModule(modules, graph), nodes


def unknown(x: Any, y: Any) -> Any:
    """A function that the graph cannot look into."""
    return x


def memory(*calls: tuple[str, Any, tuple[Any, ...]], **modules: nn.Module) -> str | None:
    """Whether the clone in the middle of ``calls`` is needed."""
    gm, nodes = graph_of(*calls, **modules)
    copy = next(node for node in nodes if node.target == "clone")
    return Memory(gm, lambda node: True).obstacle_to_sharing(copy, copy.all_input_nodes[0], keeps_strides=True)


CLONE, RELU = ("call_method", "clone", ()), ("call_function", torch.relu, ())


@pytest.mark.parametrize(
    "writer",
    [
        ("call_method", "add_", (1,)),
        ("call_function", operator.iadd, (1,)),
        ("call_function", torch.ops.aten.add_.Scalar, (1,)),
        ("call_function", operator.setitem, (0, 1)),
        ("call_function", unknown, (1,)),
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
    assert Memory(gm, lambda node: True).obstacle_to_sharing(nodes[2], nodes[1], keeps_strides=True) is None
    assert Memory(gm, lambda node: False).obstacle_to_sharing(nodes[2], nodes[1], keeps_strides=True) is not None


@pytest.mark.parametrize(
    "reader",
    [("call_method", "view", (-1,)), ("call_method", "stride", (0,)), ("call_function", unknown, (1,))],
    ids=repr,
)
def test_strides(reader: Any) -> None:
    move, swap = ("call_method", "expand", (3, -1)), ("call_method", "transpose", (0, 1))
    compute = ("call_function", torch.relu, ())
    assert "how the copy lies" in (memory(RELU, move, CLONE, compute, reader) or "")
    assert memory(RELU, swap, CLONE, compute, reader) is None, "a clone of what has no gaps lies as that does"
    assert memory(RELU, reader, move, CLONE, compute) is None, "that was before the copy"


@dataclasses.dataclass
class Outputs:
    """What a model hands out."""

    first: Any


def test_what_holds_outputs_writes_to_nothing() -> None:
    gm, (_, relu, _) = graph_of(("call_function", torch.relu, ()), ("call_function", Outputs, ()))
    found = Memory(gm, lambda node: True)
    assert found.writer_after(relu) is None
    gm, (_, relu, _) = graph_of(("call_function", torch.relu, ()), ("call_function", unknown, (1,)))
    assert Memory(gm, lambda node: True).writer_after(relu) is not None


def test_attention_of_this_package_gives_new_memory() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = graph.call_module("attention", (x, x, x))
    graph.output(attention)
    found = Memory(fx.GraphModule({"attention": ScaledDotProductAttention(0.0)}, graph), lambda node: True)
    assert found.writer_after(x) is None
    assert found.sharing(x) == [x]
    assert found.passed_on(attention) == []


def test_views_share_with_what_they_view() -> None:
    gm, (x, view, relu, inplace) = graph_of(
        ("call_method", "view", (-1,)), ("call_function", torch.relu, ()), ("call_method", "mul_", (2,))
    )
    found = Memory(gm, lambda node: True)
    assert found.sharing(view) == [x, view]
    assert found.sharing(inplace) == [relu, inplace]
    assert found.passed_on(view) == [x]
