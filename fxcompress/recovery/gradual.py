"""Compressing step by step with training in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from fxcompress.errors import UsageError
from fxcompress.pass_base import Pass

__all__ = ["Gradual"]


@dataclasses.dataclass(frozen=True)
class Gradual:
    """Compress a little, train, compress a little more, train (Han et al. 2015, arXiv 1506.02626).

    The ratios are what part of the original network is gone after each step. The cubic curve is equation 1 of Zhu &
    Gupta (2017, arXiv 1710.01878): ``r_k = r_n + (r_0 - r_n)(1 - k/n)^3``, which takes much away while there is much.
    All steps together train as long as one alone would, so that both can be compared; each goes through the whole
    learning-rate schedule.

    Args:
        pass_factory: gives the pass for a ratio, such as ``lambda ratio: PruneChannels(ratio=ratio)``.
        from_ratio: what is gone at the start, ``r_0``; 0 for a network that is whole.
        to_ratio: what is to be gone at the end, ``r_n``.
        steps: how many compressions, ``n``.
        curve: ``"cubic"``, ``"linear"``, or ``"exponential"``: the same part of what is left in each step.
        ratio_of: what a ratio of the pass means: a part of the ``"current"`` network, which is what the passes of this
            package mean (then the pass gets ``1 - (1 - r_k) / (1 - r_(k-1))``), or of the ``"original"`` one.
        calibration: data for passes that want some, as in :func:`fxcompress.compile`; not a generator.
    """

    pass_factory: Callable[[float], str | Pass]
    from_ratio: float
    to_ratio: float
    steps: int
    curve: Literal["cubic", "linear", "exponential"] = "cubic"
    ratio_of: Literal["current", "original"] = "current"
    calibration: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.from_ratio < self.to_ratio < 1:
            raise UsageError(
                f"the ratios go from what is gone already to what shall be gone, 0 <= from_ratio < to_ratio < 1; got "
                f"{self.from_ratio} and {self.to_ratio}"
            )
        if self.steps < 1:
            raise UsageError(f"a gradual compression has at least 1 step, got {self.steps}")
        for option, chosen, known in (
            ("curve", self.curve, ("cubic", "linear", "exponential")),
            ("ratio_of", self.ratio_of, ("current", "original")),
        ):
            if chosen not in known:
                raise UsageError(f"{option} must be one of {', '.join(known)}, got {chosen!r}")

    def ratios(self) -> list[float]:
        """``r_0`` to ``r_n``: what part of the original is gone, before the first step and after each."""
        start, end = self.from_ratio, self.to_ratio
        between = []
        for k in range(1, self.steps):
            part = k / self.steps
            if self.curve == "exponential":
                between.append(1 - (1 - start) * ((1 - end) / (1 - start)) ** part)
            else:
                between.append(end + (start - end) * (1 - part) ** (3 if self.curve == "cubic" else 1))
        return [start, *between, end]

    def pass_of(self, step: int) -> str | Pass:
        """The pass of a step, from 0."""
        ratios = self.ratios()
        gone, then = ratios[step], ratios[step + 1]
        return self.pass_factory(then if self.ratio_of == "original" else 1 - (1 - then) / (1 - gone))
