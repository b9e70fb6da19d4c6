"""Distillation fused into the student's graph (EXACT for what the student gives)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import fx, nn

from fxcompress.errors import PreconditionError, UsageError
from fxcompress.examples import evaluate
from fxcompress.pass_base import Example, Guarantee, Need, PassContext, Refusal, Site
from fxcompress.passes.distillation.detach import StudentPass, student_of
from fxcompress.passes.distillation.fused import GIVEN, LABELS, holder_of
from fxcompress.passes.distillation.fusing import Fusing
from fxcompress.passes.distillation.losses import DistillationLoss, SoftTargets
from fxcompress.passes.distillation.reading import output_read

__all__ = ["AttachDistillation"]


@dataclasses.dataclass(frozen=True)
class AttachDistillation(StudentPass):
    """Fuse a teacher, taps and losses into the student's graph.

    The graph then takes the student's inputs and, if a loss wants them, ``labels``; it gives a tuple: the student's
    output, a dict of the losses by name, and their weighted sum. The student runs once. The teacher stays in evaluation
    mode and gets no gradients; what losses learn (regressors, translators) are parameters of the graph.

    Args:
        teacher: a network that takes the same inputs, or a list of several whose outputs and taps are averaged. It is
            copied, so that it may be the student. ``None``: its outputs come with the data, as ``teacher_output``.
        losses: see ``losses.py``; by default :class:`SoftTargets`. Losses of one name get numbers.
        taps: pairs (of the student, of the teacher) of names for losses that read features; see :func:`resolve_tap`.
            By default :func:`suggest_taps`.
        resize: interpolate a tap of the teacher whose positions differ from the student's, with a warning; otherwise
            that is refused.
        output: which tensor of the output losses read, such as ``"logits"`` or ``"[0]"``; by default the first.

    There is one site, the output (detail: ``losses``, ``taps``).
    """

    name: ClassVar[str] = "attach-distillation"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    before: ClassVar[frozenset[str]] = frozenset({"detach-distillation"})
    timed: ClassVar[bool] = False

    teacher: nn.Module | Sequence[nn.Module] | None = None
    losses: Sequence[DistillationLoss] = ()
    taps: Sequence[tuple[str, str]] | None = None
    resize: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        for loss in self.losses:
            if not isinstance(loss, DistillationLoss):
                raise UsageError(f"losses are DistillationLoss modules, such as SoftTargets(), not {loss!r}")
        for teacher in self.teachers:
            if not isinstance(teacher, nn.Module):
                raise UsageError(f"a teacher is a module, not {type(teacher).__name__}")

    @property
    def teachers(self) -> Sequence[nn.Module]:
        """As a sequence, empty if their outputs come with the data."""
        if self.teacher is None:
            return ()
        return (self.teacher,) if isinstance(self.teacher, nn.Module) else self.teacher

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        if holder_of(context.gm) is not None:
            raise PreconditionError(f"{self.name}: there is distillation in the model; use detach-distillation before")
        if not self.teachers and not self.losses:
            raise PreconditionError(
                f"{self.name}: there is nobody to learn from; pass `teacher`, or `losses` alone if the teacher's "
                "outputs come with the data"
            )

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`."""
        losses = [copy.deepcopy(loss) for loss in self.losses or (SoftTargets(),)]
        fusing = Fusing.of(self.name, context, self.teachers, losses, self.taps, self.resize, self.output)
        detail = {"losses": [repr(loss) for loss in losses], "taps": [f"{a} <- {b}" for a, b in fusing.taps]}
        yield Site(context.gm.graph.output_node(), fusing, detail)

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        site.data.operate(site.node)

    def extended(self, gm: fx.GraphModule, example: Example) -> Example:
        """See :meth:`Pass.extended`: labels, and a teacher's outputs, that the student agrees with."""
        holder = holder_of(gm)
        missing = [name for name in holder.inputs if name not in example.kwargs] if holder is not None else []
        if not missing:
            return example
        output = output_read(evaluate(student_of(gm), example), self.output)[1]
        axes = [loss.channel_axis(output.dim()) for loss in self.losses if loss.needs_labels]
        made = {LABELS: lambda: output.argmax(axes[0]), GIVEN: output.clone}
        return Example(example.args, {**example.kwargs, **{name: made[name]() for name in missing}})
