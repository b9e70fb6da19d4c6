"""In which order passes may stand, from what they declare (``Pass.before``, ``Pass.after``), and a good order of them.

Only passes in the list count. That ``adapt-batch-norm`` comes before ``fold-batch-norm``, and that before ``quantize``,
says nothing of the first and the last alone: each has its own reason, and where no batch norm was folded it is void.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fxcompress.errors import UsageError
from fxcompress.pass_base import Pass, Stage
from fxcompress.registry import expanded, resolve

__all__ = ["in_order", "recommended_order"]


def recommended_order(passes: Any) -> list[Any]:
    """``passes`` in a good order.

    What passes declare holds; else they go by their usual stages: folding, pruning, low rank, rounding, integer
    kernels. Passes of one stage stay in the order given, and a pass without a stage stays behind what it was given
    behind.

    Args:
        passes: what :func:`fxcompress.compile` takes: Pass objects, names, names with options, presets.

    Returns:
        The same items, presets written out.

    Raises:
        UsageError: there is no such pass, or what passes declare contradicts itself.
    """
    specs = expanded(passes)
    resolved = [resolve(spec) for spec in specs]
    stages = _stages(resolved)
    return [specs[i] for i in _ordered(resolved, lambda i: (stages[i], i))]


def in_order(passes: Any) -> list[Pass]:
    """The passes that a list means, as :func:`fxcompress.registry.resolve_all` gives them, if their order is right.

    Raises:
        UsageError: there is no such pass; a pass comes too late, and what would be right; declarations contradict.
    """
    specs = expanded(passes)
    resolved = [resolve(spec) for spec in specs]
    for i, late in enumerate(resolved):
        for early in resolved[:i]:
            if why := _Declaration.of(late, early):
                right = ", ".join(_said(specs[j]) for j in _ordered(resolved, lambda j: j))
                raise UsageError(f"{early.name!r} stands before {late.name!r}, but {why}. The right order: {right}")
    return resolved


@dataclasses.dataclass(frozen=True)
class _Declaration:
    """That one pass comes before another, who says so, and why."""

    first: str
    second: str
    by: str
    why: str

    @classmethod
    def of(cls, first: Pass, second: Pass) -> _Declaration | None:
        """What one of them declares; ``None`` if either may come first. A pass says nothing about itself."""
        if first.name != second.name:
            for by, declared in ((first, second.name in first.before), (second, first.name in second.after)):
                if declared:
                    return cls(first.name, second.name, by.name, second.why_after)
        return None

    def __str__(self) -> str:
        return f"{self.first!r} comes before {self.second!r}" + (f": {self.why}" if self.why else "")


def _stages(passes: Sequence[Pass]) -> list[int]:
    stages, last = [], int(min(Stage))
    for pass_ in passes:
        last = last if pass_.stage is None else int(pass_.stage)
        stages.append(last)
    return stages


def _said(spec: Any) -> str:
    return spec if isinstance(spec, str) else str(spec.name)


def _ordered(passes: Sequence[Pass], rank: Callable[[int], Any]) -> list[int]:
    """Positions in an order that keeps what is declared: always the least by ``rank`` of those that wait for none."""
    left, order = list(range(len(passes))), []
    while left:
        waiting = {i: next((j for j in left if _Declaration.of(passes[j], passes[i])), None) for i in left}
        free = [i for i, j in waiting.items() if j is None]
        if not free:
            raise _contradiction(passes, waiting)
        order.append(min(free, key=rank))
        left.remove(order[-1])
    return order


def _contradiction(passes: Sequence[Pass], waiting: dict[int, int | None]) -> UsageError:
    """What to say where every pass waits for another."""
    walked: list[int] = []
    at = next(iter(waiting))
    while at not in walked:
        walked.append(at)
        following = waiting[at]
        assert following is not None, "every pass waits"
        at = following
    circle = [*walked[walked.index(at) :], at]
    said = []
    for second, first in itertools.pairwise(circle):
        declaration = _Declaration.of(passes[first], passes[second])
        assert declaration is not None, "it waits for that"
        said.append(f"{declaration.by!r} says that {declaration}")
    names = ", ".join(dict.fromkeys(repr(passes[i].name) for i in circle))
    return UsageError(f"the passes {names} can stand in no order: {'; '.join(said)}. Give fewer of them in one call")
