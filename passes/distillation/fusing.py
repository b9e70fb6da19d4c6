"""Who learns what from whom, decided, and put into the student's graph."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import fx, nn

from fxcompress import editing
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec, shapes
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example, PassContext
from fxcompress.passes.distillation.channels import kept_channels
from fxcompress.passes.distillation.fused import GIVEN, HOLDER, LABELS, Distillation, Teacher, Term
from fxcompress.passes.distillation.losses import DistillationLoss, FeatureMatching
from fxcompress.passes.distillation.reading import output_node
from fxcompress.passes.distillation.taps import pairs_of, resolve_tap
from fxcompress.passes.distillation.teachers import TappedTeacher, kept, recorded

__all__ = ["Fusing"]

Taps = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """A loss under its name: what it is at each pair of values that it reads, by the number of the pair."""

    name: str
    loss: DistillationLoss
    terms: Mapping[int, Term]


@dataclasses.dataclass(frozen=True, eq=False)
class Fusing:
    """A teacher, taps and losses to be put into a student.

    Attributes:
        context: of the student's graph.
        example: inputs of it.
        teachers: what they give is the output and the taps; none if their outputs come with the data.
        values: what losses read of the student, likewise.
        taps: the names of the pairs.
        losses: the losses.
    """

    context: PassContext
    example: Example
    teachers: Sequence[TappedTeacher]
    values: Sequence[fx.Node]
    taps: Taps
    losses: Sequence[_Placed]

    @classmethod
    def of(
        cls,
        name: str,
        context: PassContext,
        teachers: Sequence[nn.Module],
        losses: Sequence[DistillationLoss],
        taps: Taps | None,
        resize: bool,
        output: str | None,
    ) -> Fusing:
        """Decide; ``name`` is that of the pass, the rest its options."""
        gm, example = context.gm, context.example
        assert example is not None, "the pass needs one"
        known = [recorded(teacher, example, name) for teacher in teachers]
        seen = [shapes(one, its.args, dict(its.kwargs)) for one, its in known]
        readers = [loss.name for loss in losses if loss.reads == "features"]
        if readers and not known:
            raise PreconditionError(f"{name}: {', '.join(readers)} read features; pass the teacher that gives them")
        if any(loss.needs_labels for loss in losses):
            _check_labels(name, context)
        if not readers:
            taps = []
        elif taps is None:
            taps = pairs_of((gm, context.shapes), (known[0][0], seen[0]))
        mine = [resolve_tap(gm, tap, "student", context.history) for tap, _ in taps]
        values = [output_node(gm, example, output), *mine]
        names = [tap for _, tap in taps]
        tapped = [TappedTeacher.of(*one, its, output, names) for one, its in zip(known, seen, strict=True)]
        specs = [context.shapes.spec(node) for node in values]
        theirs = [teacher.specs for teacher in tapped] or [tuple(specs[:1])]
        _check(name, specs, theirs, any(loss.reads == "outputs" for loss in losses))
        fitting = _Fitting(name, context, values, taps, resize, theirs[0])
        return cls(context, example, tapped, values, taps, fitting.placed(losses))

    def operate(self, end: fx.Node) -> None:
        """Put it in; ``end`` is the output."""
        gm = self.context.gm
        asked = _Asked(gm)
        labels = asked.node(LABELS) if any(placed.loss.needs_labels for placed in self.losses) else None
        given = None if self.teachers else asked.node(GIVEN)
        holder = Distillation(tuple(asked.added)).train(gm.training)
        gm.add_module(HOLDER, holder)
        theirs = self._taught(holder, asked.last) if given is None else [given]
        known = self.context.shapes
        memory = Memory(gm, lambda node: node in known and isinstance(known[node], TensorSpec))
        mine = [kept(node, memory) for node in self.values]
        values: dict[str, fx.Node] = {}
        weighted = []
        with gm.graph.inserting_before(end):
            for placed in self.losses:
                parts = []
                for place, term in placed.terms.items():
                    path = f"terms.{placed.name}" if len(placed.terms) == 1 else f"terms.{placed.name}_at_{place}"
                    editing.set_attribute(holder, path, term.train(gm.training))
                    reads = (mine[place], theirs[place], labels if placed.loss.needs_labels else None)
                    parts.append(gm.graph.call_module(f"{HOLDER}.{path}", reads))
                values[placed.name] = _sum(parts)
                weighted.append(gm.graph.call_function(operator.mul, (values[placed.name], placed.loss.weight)))
            total = _sum(weighted)
        end.args = ((end.args[0], values, total),)

    def _taught(self, holder: Distillation, after: fx.Node) -> list[fx.Node]:
        """What the teachers give, before the student does anything, as that may write to the inputs."""
        graph = self.context.gm.graph
        holder.teacher = Teacher([t.gm for t in self.teachers], any(t.writes for t in self.teachers))
        inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        kwargs: dict[str, fx.node.Argument] = {name: inputs.pop(name) for name in self.example.kwargs}
        args = tuple(list(inputs.values())[: len(self.example.args)])
        with graph.inserting_after(after):
            last = call = graph.call_module(f"{HOLDER}.teacher", args, kwargs)
        found = []
        for index in range(1 + len(self.taps)):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, index))
            found.append(last)
        return found


class _Asked:
    """Inputs of the graph, which get more."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._graph = gm.graph
        self._all = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
        self.added: list[str] = []

    @property
    def last(self) -> fx.Node:
        """The last of them."""
        last: fx.Node = list(self._all.values())[-1]
        return last

    def node(self, name: str) -> fx.Node:
        """The input ``name``, which may be left out if it was not there."""
        if name not in self._all:
            with self._graph.inserting_after(self.last):
                self._all[name] = self._graph.placeholder(name, default_value=None)
            self.added.append(name)
        found: fx.Node = self._all[name]
        return found


def _sum(values: Sequence[fx.Node]) -> fx.Node:
    return reduce(lambda a, b: a.graph.call_function(operator.add, (a, b)), values)


def _check_labels(name: str, context: PassContext) -> None:
    """An input of that name may be the student's own; one that it was recorded without must stay what it was."""
    assert context.example is not None, "the pass needs one"
    names = [str(node.target) for node in context.gm.graph.nodes if node.op == "placeholder"]
    if LABELS in names[len(context.example.args) :] and LABELS not in context.example.kwargs:
        raise PreconditionError(
            f"{name}: the student takes {LABELS!r} itself, and was recorded without; give some in `example_kwargs`, so "
            "that both read them, or wrap the model in one that does not take them"
        )


# ------------------------------------------------------------------------------------------------- shapes
def _check(
    name: str, mine: Sequence[TensorSpec], theirs: Sequence[Sequence[TensorSpec]], outputs_are_read: bool
) -> None:
    for specs in theirs:
        if outputs_are_read and specs[0].shape != mine[0].shape:
            raise UsageError(
                f"{name}: the student gives {tuple(mine[0].shape)} and a teacher {tuple(specs[0].shape)}; losses on "
                "outputs compare like with like: give both the same classes, or choose others with `output`"
            )
        if [spec.shape for spec in specs] != [spec.shape for spec in theirs[0]]:
            raise UsageError(f"{name}: teachers whose outputs or taps differ in shape cannot be averaged")


@dataclasses.dataclass(frozen=True)
class _Fitting:
    """Losses to the shapes of what they read; the attributes are those of :class:`Fusing`, and the teacher's specs."""

    name: str
    context: PassContext
    values: Sequence[fx.Node]
    taps: Taps
    resize: bool
    theirs: Sequence[TensorSpec]

    def placed(self, losses: Sequence[DistillationLoss]) -> list[_Placed]:
        """Each of ``losses`` under a name of its own."""
        counts, seen = Counter(loss.name for loss in losses), Counter[str]()
        found = []
        for loss in losses:
            seen[loss.name] += 1
            name = f"{loss.name}_{seen[loss.name]}" if counts[loss.name] > 1 else loss.name
            places = range(1, len(self.values)) if loss.reads == "features" else range(1)
            found.append(_Placed(name, loss, {place: self._term(loss, place) for place in places}))
        return found

    def _term(self, loss: DistillationLoss, place: int) -> Term:
        mine = torch.Size(self.context.shapes.shape(self.values[place]))
        theirs = torch.Size(self.theirs[place].shape)
        resized = self._resized(mine, theirs, place) if place else None
        if isinstance(loss, FeatureMatching) and loss.channels is None:
            width = theirs[loss.channel_axis(len(theirs))]
            kept_ = kept_channels(self.values[place], self.context.shapes, self.context.history, width)
            if kept_ is not None:
                loss = FeatureMatching(kept_, weight=loss.weight, name=loss.name, channel_dim=loss.channel_dim)
        spec = self.context.shapes.spec(self.values[place])
        prepared = loss.prepared(mine, resized or theirs).to(spec.device, spec.dtype)
        return Term(prepared, resized is not None)

    def _resized(self, mine: torch.Size, theirs: torch.Size, place: int) -> torch.Size | None:
        """The shape that the teacher's value must be brought to; ``None`` if it has the student's positions."""
        where = {3: slice(1, 2), 4: slice(2, None)}.get(len(mine))
        if where is None or len(mine) != len(theirs) or mine[where] == theirs[where]:
            return None
        tap, other = self.taps[place - 1]
        sizes = tuple(mine[where]), tuple(theirs[where])
        text = f"{tap!r} of the student has {sizes[0]} positions, {other!r} of the teacher {sizes[1]}"
        if not self.resize:
            raise UsageError(f"{self.name}: {text}; choose other taps, or interpolate the teacher's with resize=True")
        warnings.warn(f"{self.name}: {text}, which is interpolated", stacklevel=2)
        shape = list(theirs)
        shape[where] = mine[where]
        return torch.Size(shape)
