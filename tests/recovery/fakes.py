"""Stands in for the passes that attach and detach a teacher: the same contract, the plainest losses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.editing import private_copy
from fxcompress.recovery import objective


class Distillation(nn.Module):
    """A teacher, which stays as it is, and a layer that is trained with the student."""

    def __init__(self, teacher: nn.Module, kind: str, training: bool) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.kind, self.training = kind, training
        self.adaptor = nn.Linear(8, 5)
        nn.init.eye_(self.adaptor.weight)

    def forward(self, x: Tensor, hidden: Tensor, output: Tensor, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        assert not any(module.training for module in self.teacher.modules())
        wanted = self.teacher(x)
        if self.kind == "hidden":
            terms = {"hint": F.mse_loss(self.adaptor(hidden), wanted)}
        else:
            terms = {"soft": F.mse_loss(output, wanted)}
        if self.kind == "labels":
            terms["hard"] = F.cross_entropy(output, labels)
        return terms, sum(terms.values())  # type: ignore[return-value]


def fused(gm: fx.GraphModule, teacher: nn.Module, kind: str = "soft") -> fx.GraphModule:
    """The student with its teacher in one graph."""
    gm = private_copy(gm)
    gm.add_module("distillation", Distillation(teacher, kind, gm.training))
    graph = gm.graph
    (x,), (end,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    output = end.args[0]
    labels: Any = None
    if kind == "labels":
        with graph.inserting_after(x):
            labels = graph.placeholder("labels", default_value=None)
    with graph.inserting_before(end):
        both = graph.call_module("distillation", (x, output.args[0], output, labels))
        terms, loss = (graph.call_function(_item, (both, i)) for i in (0, 1))
    end.args = ((output, terms, loss),)
    gm.recompile()
    return gm


def _item(pair: Any, index: int) -> Any:
    return pair[index]


def alone(gm: fx.GraphModule) -> fx.GraphModule:
    """The student by itself."""
    gm = private_copy(gm)
    (end,) = gm.graph.find_nodes(op="output")
    end.args = (end.args[0][0],)
    gm.graph.eliminate_dead_code()
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.target == "labels":
            gm.graph.erase_node(node)
    del gm.distillation
    gm.recompile()
    return gm


def _compiled(gm: fx.GraphModule, name: str, example: Any, fields: dict[str, Any]) -> fx.GraphModule:
    if name == "attach-distillation":
        return fused(gm, fields["teacher"], fields["losses"] or "soft")
    assert name == "detach-distillation"
    return alone(gm)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """These in place of the real passes."""
    with mock.patch.object(objective, "_compiled", _compiled):
        yield
