"""Distillation taken out of a student's graph again (EXACT for what the student gives)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from fxcompress import editing
from fxcompress.pass_base import Example, Guarantee, Pass, PassContext, Refusal, Site
from fxcompress.passes.distillation.fused import ADDED, HOLDER, holder_of

__all__ = ["DetachDistillation", "StudentPass", "student_of"]


class StudentPass(Pass):
    """A pass whose guarantee is about what the student gives."""

    def compared(self, gm: fx.GraphModule, example: Example) -> tuple[fx.GraphModule, Example]:
        """See :meth:`Pass.compared`: the student."""
        holder = holder_of(gm)
        if holder is None:
            return gm, example
        kwargs = {k: v for k, v in example.kwargs.items() if k not in holder.inputs}
        return student_of(gm), Example(example.args, kwargs)


@dataclasses.dataclass(frozen=True)
class DetachDistillation(StudentPass):
    """Give the student back, node for node as it was; what was put in around it is gone."""

    name: ClassVar[str] = "detach-distillation"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    why_after: ClassVar[str] = "it takes out what 'attach-distillation' puts in (to exchange teachers, compile twice)"
    timed: ClassVar[bool] = False

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: the output, if there is distillation in the graph."""
        if holder_of(context.gm) is not None:
            yield Site(context.gm.graph.output_node(), context.gm)

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        _detach(site.data)

    def extended(self, gm: fx.GraphModule, example: Example) -> Example:
        """See :meth:`Pass.extended`: without labels, unless the student takes them."""
        taken = {str(node.target) for node in gm.graph.nodes if node.op == "placeholder"}
        return Example(example.args, {k: v for k, v in example.kwargs.items() if k in taken or k not in ADDED})


def student_of(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` if there is no distillation in it, else a copy without."""
    if holder_of(gm) is not None:
        gm = editing.private_copy(gm)
        _detach(gm)
        editing.clean_up(gm)
    return gm


def _detach(gm: fx.GraphModule) -> None:
    holder = holder_of(gm)
    assert holder is not None, "asked before"
    nodes = list(gm.graph.nodes)
    end = nodes.pop()
    output, *_ = end.args[0]
    end.args = (output,)
    ours: set[fx.Node] = set()
    for node in nodes:
        put_in = node.op == "call_module" and str(node.target).startswith(f"{HOLDER}.")
        asked_for = node.op == "placeholder" and node.target in holder.inputs
        if put_in or asked_for or not ours.isdisjoint(node.all_input_nodes):
            ours.add(node)
    for node in reversed(nodes):
        for_ours = node.users and ours.issuperset(node.users) and not editing.has_side_effect(node)
        if node in ours or for_ours:  # the latter are copies of taps
            ours.add(node)
            editing.erase(node)
    delattr(gm, HOLDER)
