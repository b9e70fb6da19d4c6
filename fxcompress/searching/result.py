"""What a search gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tabulate import tabulate
from torch import fx

from fxcompress.errors import UsageError
from fxcompress.pass_base import Pass
from fxcompress.reporting import Curve
from fxcompress.searching.building import Plan
from fxcompress.searching.measuring import MEASURES

__all__ = ["Point", "SearchResult", "undominated"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A pipeline that was built and measured.

    Attributes:
        cost: what is left of each measure (``"latency"``, ``"macs"``, ``"params"``, ``"bytes"``), as a fraction of the
            original.
        drop: what is lost of what ``evaluate`` says; without it, ``error``.
        error: distance of the outputs from the original's relative to their norm.
        passes: what :func:`fxcompress.compile` makes it with.
        settings: for each pass that was turned, the setting of each layer.
    """

    cost: Mapping[str, float]
    drop: float
    error: float
    passes: tuple[Pass, ...]
    settings: Plan

    def order(self, measure: str) -> tuple[float, float, float]:
        """What loses least comes first; of equal ones what has least of ``measure``."""
        return self.drop, self.error, self.cost[measure]

    def __str__(self) -> str:
        return ", ".join(_in_words(p) for p in self.passes) or "nothing"


def _in_words(pass_: Pass) -> str:
    for option in ("per_layer", "only"):
        if layers := getattr(pass_, option, None):
            return f"{pass_.name} ({len(layers)} layer{'s' if len(layers) > 1 else ''})"
    return pass_.name


def undominated(points: Sequence[Point], measure: str) -> tuple[Point, ...]:
    """The points that no other beats in both ``measure`` and drop, by ascending cost."""
    ordered = sorted(points, key=lambda p: (p.cost[measure], p.drop, p.error))
    found: list[Point] = []
    for point in ordered:
        if not found or point.drop < found[-1].drop:
            found.append(point)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What :func:`fxcompress.search` found. ``str(result)`` is a table of the front.

    Attributes:
        measure, target: what was to be small, and the fraction that may be left of it.
        max_drop: what may be lost.
        front: of all that was measured, what nothing beats in both ``measure`` and drop, by ascending cost.
        tried: all that was measured, in order.
        within_target: the point with the least drop among those within the target; ``None`` if there is none.
        within_drop: the point with the least cost among those that lose no more than ``max_drop``.
        sensitivity: how the output's error grows as one layer alone is compressed.
        left_out: passes that were not used and pipelines that could not be built, with reasons.
        complete: whether it ran to its end, not only to ``time_limit``.
        graph: the compiled best point, if both conditions are met; use :attr:`module`.
    """

    measure: str
    target: float
    max_drop: float
    front: tuple[Point, ...]
    tried: tuple[Point, ...]
    within_target: Point | None
    within_drop: Point | None
    sensitivity: tuple[Curve, ...]
    left_out: tuple[tuple[str, str], ...]
    complete: bool
    graph: fx.GraphModule | None = dataclasses.field(default=None, repr=False)

    @property
    def met(self) -> bool:
        """Whether something is within the target and loses no more than ``max_drop``."""
        return self.within_target is not None and self.within_target.drop <= self.max_drop

    @property
    def best(self) -> Point:
        """The point with the least drop within the target.

        Raises:
            UsageError: nothing meets both conditions.
        """
        if not self.met:
            raise UsageError(
                f"{self._verdict()}. Take result.within_target or result.within_drop and compile its passes"
            )
        assert self.within_target is not None
        return self.within_target

    @property
    def passes(self) -> list[Pass]:
        """Those of :attr:`best`; :func:`fxcompress.compile` makes the same again with the same calibration data."""
        return list(self.best.passes)

    @property
    def module(self) -> fx.GraphModule:
        """The compiled graph of :attr:`best`, with its report."""
        point = self.best
        assert self.graph is not None, f"{point} is compiled where both conditions are met"
        return self.graph

    def _verdict(self) -> str:
        wanted = f"{self.measure} {self.target:g} with a drop of at most {self.max_drop:g}"
        if self.met:
            return f"{wanted}: met"
        told = []
        point = self.within_target
        if point is None:
            least = min(self.tried, key=lambda p: p.cost[self.measure])
            told.append(f"the target was not met by anything tried (the least is {least.cost[self.measure]:.3f})")
        else:
            told.append(f"max_drop was not met within the target (the least drop there is {point.drop:.4g})")
        if self.within_drop is not None:
            told.append(f"the least {self.measure} within max_drop is {self.within_drop.cost[self.measure]:.3f}")
        return f"{wanted}: not met; {'; '.join(told)}"

    def __str__(self) -> str:
        rows = []
        for point in self.front:
            marks = ["best" if self.met else "within target"] if point is self.within_target else []
            marks += ["within max_drop"] if point is self.within_drop else []
            numbers = [f"{point.cost[m]:.3f}" for m in MEASURES] + [f"{point.drop:.4f}", f"{point.error:.4f}"]
            rows.append([*numbers, ", ".join(marks), str(point)])
        table = tabulate(
            rows,
            headers=[*MEASURES, "drop", "error", "", "passes"],
            disable_numparse=True,
            colalign=["right"] * (len(MEASURES) + 2) + ["left", "left"],
        )
        lines = [self._verdict(), table, f"{len(self.tried)} pipelines measured"]
        if not self.complete:
            lines.append("stopped by time_limit; give more time, and `resume`, and it goes on")
        lines += [f"left out: {what}: {why}" for what, why in self.left_out]
        return "\n".join(lines)
