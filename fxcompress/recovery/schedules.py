"""Learning rates over time: functions of (step, total) that give what the first learning rate is multiplied by.

They are pure, so a run that goes on from a checkpoint needs to remember nothing but its step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fxcompress.errors import UsageError

__all__ = ["SCHEDULES", "Milestones", "Rewound", "Schedule", "Warmup", "as_schedule", "constant", "cosine", "linear"]

Schedule = Callable[[int, int], float]


def constant(step: int, total: int) -> float:
    """Always 1."""
    return 1.0


def linear(step: int, total: int) -> float:
    """From 1 at step 0 in a straight line to 0 at step ``total``."""
    return 1.0 - min(step / total, 1.0)


def cosine(step: int, total: int) -> float:
    """From 1 at step 0 along half a cosine to 0 at step ``total`` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))


@dataclasses.dataclass(frozen=True)
class Milestones:
    """Multiplied by ``factor`` at each of some points.

    Args:
        at: the points, as fractions of the whole.
        factor: what the learning rate is multiplied by there.
    """

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __call__(self, step: int, total: int) -> float:
        return float(self.factor ** sum(step >= point * total for point in self.at))


@dataclasses.dataclass(frozen=True)
class Warmup:
    """In a straight line up to the first learning rate, then ``schedule`` over the rest.

    Args:
        schedule: a function of (step, total) or the name of one.
        steps: how many steps it takes; the first of them is ``1 / steps`` of the learning rate.
    """

    schedule: str | Schedule = "cosine"
    steps: int = 100

    def __post_init__(self) -> None:
        as_schedule(self.schedule)
        if self.steps < 1:
            raise UsageError(f"a warm-up takes at least 1 step, got {self.steps}")

    def __call__(self, step: int, total: int) -> float:
        if step < self.steps:
            return (step + 1) / self.steps
        return as_schedule(self.schedule)(step - self.steps, max(total - self.steps, 1))


@dataclasses.dataclass(frozen=True)
class Rewound:
    """The last part of the schedule that the network was first trained with, once more: learning rate rewinding
    (Renda, Frankle, Carbin 2020, arXiv 2003.02389).

    Args:
        schedule: the original one, a function of (step, total) or the name of one.
        last: which part of it comes again, in (0, 1]. It is stretched over all steps of this training, so ``last=0.25``
            over 1000 steps is what steps 3000 to 4000 of 4000 were.
    """

    schedule: str | Schedule = "cosine"
    last: float = 1.0

    def __post_init__(self) -> None:
        as_schedule(self.schedule)
        if not 0 < self.last <= 1:
            raise UsageError(f"`last` is the part of the schedule that comes again, above 0 and at most 1: {self.last}")

    def __call__(self, step: int, total: int) -> float:
        original = max(round(total / self.last), total)
        return as_schedule(self.schedule)(original - total + step, original)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def as_schedule(schedule: Any) -> Schedule:
    """The function that ``schedule`` means: itself, or the one of that name.

    Raises:
        UsageError: there is none.
    """
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if callable(schedule):
        return schedule  # type: ignore[no-any-return]
    raise UsageError(
        f"a schedule is one of {', '.join(SCHEDULES)} or a function of (step, total), such as Rewound('cosine', 0.25), "
        f"not {schedule!r}"
    )
