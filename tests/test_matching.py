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


def test_overrides_are_found() -> None:
    assert matching.override_of(nn.Linear(2, 2)) is None
    hooked = nn.Linear(2, 2)
    hooked.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    assert "hooks" in (matching.override_of(hooked) or "")
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
    assert "parametrizations" in (matching.override_of(parametrized) or "")
    replaced = nn.Linear(2, 2)
    replaced.forward = torch.relu  # type: ignore[assignment]
    assert "`forward`" in (matching.override_of(replaced) or "")
