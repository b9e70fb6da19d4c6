"""From what was measured of single layers to plans that should do: a knapsack over layers, then one over passes.

**Over the layers of one pass** savings add up, and so do squared errors, as far as layers do not know of each other.
What a layer saves is taken from what the pass saves with *all* its layers at that setting, which is measured, in
proportion to what was found of each alone. For latency the proportion is that of the time that the treated nodes take
in the original, since what a single layer brings is less than the noise, and integers pay only if neighbours have them
as well. **Over passes** what is left multiplies, so the knapsack adds logarithms.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from fxcompress.searching.building import Plan, Stage
from fxcompress.searching.knapsack import Choice, best_within, front

__all__ = ["Chooser", "Found", "Together", "Wish"]

_POINTS = 120
_MOST_STAGES = 4


@dataclasses.dataclass(frozen=True)
class Found:
    """What one layer at one setting does alone: the relative error of the output, and what part it saves of a measure,
    or, for latency, the part of the time that the treated nodes take."""

    error: float
    saved: float


@dataclasses.dataclass(frozen=True)
class Together:
    """What all layers of a pass at one setting do: the error, and what is left of the measure."""

    error: float
    left: float


@dataclasses.dataclass(frozen=True)
class Wish:
    """A plan, what should be left of the measure, and the square of the error that it should have."""

    plan: Plan
    left: float
    error: float


class Chooser:
    """Plans from measurements.

    Args:
        stages: the passes.
        found: for each stage what was found, by (layer, number of the setting).
        together: for each stage what was found of all layers at each setting; may lack some.
        shares: ``found`` has parts of time, so without ``together`` nothing is known.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        found: Sequence[Mapping[tuple[str, int], Found]],
        together: Sequence[Mapping[int, Together]],
        *,
        shares: bool,
    ) -> None:
        self._stages = stages
        fronts = [_front(*of, shares=shares) for of in zip(stages, found, together, strict=True)]
        self._fronts = fronts

    def subsets(self) -> Iterator[tuple[int, ...]]:
        """Stages to use, all combinations of those that save anything."""
        useful = [i for i, (choices, _) in enumerate(self._fronts) if choices[0].size < -1e-9][:_MOST_STAGES]
        for count in range(1, len(useful) + 1):
            yield from itertools.combinations(useful, count)

    def wish(self, stages: Sequence[int], goal: float) -> Wish | None:
        """What should have the least error with ``goal`` left of the measure, by these stages alone."""
        groups = [[(math.log(1 + c.size), c.error) for c in self._fronts[i][0]] for i in stages]
        chosen = best_within(front(groups), math.log(goal))
        if chosen is None:
            return None
        plan: list[Mapping[str, float]] = [{} for _ in self._stages]
        for i, pick in zip(stages, chosen.picks, strict=True):
            choices, layers = self._fronts[i]
            plan[i] = _settings(self._stages[i], layers, choices[pick])
        return Wish(tuple(plan), math.exp(chosen.size), chosen.error)


def _front(
    stage: Stage, found: Mapping[tuple[str, int], Found], together: Mapping[int, Together], *, shares: bool
) -> tuple[list[Choice], list[list[int]]]:
    """The best that a stage can do, and for each of its knobs which settings its options are (after "not at all")."""
    levels = range(stage.levels)
    sums = {level: sum(f.saved for (_, n), f in found.items() if n == level) for level in levels}
    scale = {}
    for level in levels:
        if level in together and sums[level] > 0:
            scale[level] = max(1 - together[level].left, 0.0) / sums[level]
        else:
            scale[level] = 0.0 if shares else 1.0
    factor = _error_factor(found, together)
    groups, numbers = [], []
    for knob in stage.knobs:
        options, mine = [(0.0, 0.0)], []
        for number in range(len(knob.settings)):
            one = found.get((knob.layer, number))
            if one is not None and math.isfinite(one.error) and one.saved * scale[number] > 0:
                options.append((-one.saved * scale[number], factor * one.error**2))
                mine.append(number)
        groups.append(options)
        numbers.append(mine)
    choices = [c for c in front(groups) if c.size > -0.995]
    step = max(1, math.ceil(len(choices) / _POINTS))
    return [*choices[:-1:step], choices[-1]], numbers


def _error_factor(found: Mapping[tuple[str, int], Found], together: Mapping[int, Together]) -> float:
    """The square of the error of all layers at the mildest setting, relative to the sum of their squares."""
    alone = sum(f.error**2 for (_, n), f in found.items() if n == 0 and math.isfinite(f.error))
    if 0 not in together or alone <= 0 or not math.isfinite(together[0].error):
        return 1.0
    return min(max(together[0].error ** 2 / alone, 0.05), 20.0)


def _settings(stage: Stage, numbers: Sequence[Sequence[int]], choice: Choice) -> dict[str, float]:
    return {
        knob.layer: knob.settings[mine[pick - 1]]
        for knob, mine, pick in zip(stage.knobs, numbers, choice.picks, strict=True)
        if pick
    }
