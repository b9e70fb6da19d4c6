"""How much each layer is compressed: exact choices under a budget, from tables of sizes and errors.

Each layer has a table of options: itself, whole, with error 0, and every decomposition with its size and error. One
option of each layer is chosen so that the sizes add up to no more than a budget.

**The largest error least** (:func:`least_maximum`), the objective of Liebenwein et al. 2021 (arXiv 2107.11442, equation
3). For a threshold t every layer by itself takes its smallest option with an error of at most t; the total size falls
as t rises. So the optimum is the smallest of all errors that occur at which the total fits, and bisection over these
finds it. What the budget leaves then is used for a small sum of squares among the options below that threshold.

**The sum of squared errors least** (:func:`least_sum`), a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004,
chapter 11). Options on the lower convex hull of a layer are taken in the order of error saved for each unit of size,
which solves the relaxation in which one layer may be split, and gives a bound. With the multiplier at which that ends,
an option whose reduced cost exceeds the gap between bound and best choice known can be in no better choice; over the
few that are left, dynamic programming finds the best one. If there are more states than :data:`_STATES` only those
nearest to the bound are kept, and the gap that is reported need not be closed.

**The same ratio for every layer** (:func:`constant_ratio`): each takes its best option within that part of its size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Allocation", "Options", "Unreachable", "constant_ratio", "least_maximum", "least_sum"]

_STATES = 4000
_MOST_AT_ONCE = 50 * _STATES


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What can become of one layer; option 0 is the layer as it is.

    Attributes:
        size: of each option, in whatever the budget is in.
        error: of each option, not negative; 0 for option 0.
    """

    size: np.ndarray
    error: np.ndarray

    def front(self) -> np.ndarray:
        """The options that no other beats in both, by ascending size (and so descending error)."""
        order = np.lexsort((self.error, self.size))
        best = np.minimum.accumulate(self.error[order])
        keep = np.ones(len(order), dtype=np.bool_)
        keep[1:] = best[1:] < best[:-1]
        return order[keep]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The option chosen for each layer.

    Attributes:
        choice: its number.
        bound: no choice within the budget has an objective below this.
        value: the objective of this choice: the largest error, or the sum of the squares.
    """

    choice: tuple[int, ...]
    bound: float
    value: float


class Unreachable(Exception):
    """No choice is within the budget; ``least`` is the smallest size that there is."""

    def __init__(self, least: float) -> None:
        super().__init__(f"nothing is smaller than {least}")
        self.least = least


def _check(layers: Sequence[Options], budget: float) -> None:
    least = float(sum(o.size.min() for o in layers))
    if least > budget:
        raise Unreachable(least)


def least_maximum(layers: Sequence[Options], budget: float) -> Allocation:
    """The choice with the smallest largest error and, among these, a small sum of squared errors.

    Raises:
        Unreachable: nothing is within ``budget``.
    """
    _check(layers, budget)
    fronts = [o.front() for o in layers]
    errors = [o.error[f] for o, f in zip(layers, fronts, strict=True)]
    sizes = [o.size[f] for o, f in zip(layers, fronts, strict=True)]

    def total(t: float) -> float:  # errors fall along a front: the first that is small enough is the smallest
        return float(sum(s[np.searchsorted(-e, -t)] for e, s in zip(errors, sizes, strict=True)))

    thresholds = np.unique(np.concatenate([np.zeros(1), *errors]))
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(thresholds[middle]) <= budget else (middle + 1, high)
    t = float(thresholds[low])
    allowed = [np.flatnonzero(o.error <= t) for o in layers]
    inner = least_sum([Options(o.size[a], o.error[a]) for o, a in zip(layers, allowed, strict=True)], budget)
    choice = tuple(int(a[i]) for a, i in zip(allowed, inner.choice, strict=True))
    return Allocation(choice, t, max((float(o.error[i]) for o, i in zip(layers, choice, strict=True)), default=0.0))


def constant_ratio(layers: Sequence[Options], budget: float) -> Allocation:
    """For each layer the best option within the same part of its own size, the largest such part that fits.

    Layers without so small an option take their smallest one.

    Raises:
        Unreachable: nothing is within ``budget``.
    """
    _check(layers, budget)
    fronts = [o.front() for o in layers]

    def chosen(part: float) -> list[int]:
        picks = []
        for o, f in zip(layers, fronts, strict=True):
            place = int(np.searchsorted(o.size[f], part * o.size[0] * (1 + 1e-12), side="right")) - 1
            picks.append(int(f[max(place, 0)]))
        return picks

    parts = np.unique(
        np.concatenate([np.zeros(1), *(o.size[f] / o.size[0] for o, f in zip(layers, fronts, strict=True))])
    )
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        size = sum(float(o.size[i]) for o, i in zip(layers, chosen(parts[middle]), strict=True))
        low, high = (middle, high) if size <= budget else (low, middle - 1)
    choice = tuple(chosen(parts[low]))
    value = float(sum(o.error[i] ** 2 for o, i in zip(layers, choice, strict=True)))
    return Allocation(choice, 0.0, value)


# ------------------------------------------------------------------------------------------------- sum of squares
def least_sum(layers: Sequence[Options], budget: float) -> Allocation:
    """The choice with the smallest sum of squared errors.

    Raises:
        Unreachable: nothing is within ``budget``.
    """
    _check(layers, budget)
    fronts = [o.front() for o in layers]
    sizes = [o.size[f].astype(np.float64) for o, f in zip(layers, fronts, strict=True)]
    costs = [o.error[f] ** 2 for o, f in zip(layers, fronts, strict=True)]
    picks, bound, multiplier = _relaxed(sizes, costs, budget)
    _improve(picks, sizes, costs, budget)
    value = _value(picks, costs)
    if value > bound:
        better = _core(sizes, costs, budget, multiplier, value)
        if better is not None:
            picks, bound = better.picks, max(bound, better.bound)
            value = _value(picks, costs)
    return Allocation(tuple(int(f[p]) for f, p in zip(fronts, picks, strict=True)), min(bound, value), value)


def _value(picks: Sequence[int], costs: Sequence[np.ndarray]) -> float:
    return math.fsum(float(c[p]) for c, p in zip(costs, picks, strict=True))


def _hull(size: np.ndarray, cost: np.ndarray) -> list[int]:
    """The lower convex hull of points of ascending size and descending cost."""
    x, y = size.tolist(), cost.tolist()  # several times as fast to index
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _relaxed(sizes: list[np.ndarray], costs: list[np.ndarray], budget: float) -> tuple[list[int], float, float]:
    """A choice, a bound for all choices, and the multiplier: what a unit of size is worth."""
    steps = []
    for layer, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        hull = _hull(size, cost)
        for a, b in itertools.pairwise(hull):
            steps.append((float(cost[a] - cost[b]) / float(size[b] - size[a]), layer, b, float(size[b] - size[a])))
    steps.sort(key=lambda s: (-s[0], s[1], s[2]))
    picks = [0] * len(sizes)
    left = budget - math.fsum(float(s[0]) for s in sizes)
    multiplier, blocked = 0.0, set()
    for slope, layer, option, more in steps:
        if layer in blocked:
            continue
        if more <= left:
            picks[layer], left = option, left - more
            continue
        multiplier = multiplier or slope  # the first that does not fit
        blocked.add(layer)
    return picks, _lagrangian(sizes, costs, budget, multiplier), multiplier


def _lagrangian(sizes: list[np.ndarray], costs: list[np.ndarray], budget: float, multiplier: float) -> float:
    inside = math.fsum(float((c + multiplier * s).min()) for s, c in zip(sizes, costs, strict=True))
    return max(inside - multiplier * budget, 0.0)


def _improve(picks: list[int], sizes: list[np.ndarray], costs: list[np.ndarray], budget: float) -> None:
    """Use what the budget leaves: while any layer gains by a larger option that fits, the one that gains most."""
    left = budget - math.fsum(float(s[p]) for s, p in zip(sizes, picks, strict=True))
    while True:
        best, gain = None, 0.0
        for layer, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            place = int(np.searchsorted(size, size[picks[layer]] + left, side="right")) - 1
            if float(cost[picks[layer]] - cost[place]) > gain:
                best, gain = (layer, place), float(cost[picks[layer]] - cost[place])
        if best is None:
            return
        layer, place = best
        left -= float(sizes[layer][place] - sizes[layer][picks[layer]])
        picks[layer] = place


@dataclasses.dataclass(frozen=True)
class _Found:
    picks: list[int]
    bound: float


def _core(
    sizes: list[np.ndarray], costs: list[np.ndarray], budget: float, multiplier: float, value: float
) -> _Found | None:
    """The best choice if it is better than ``value``, by dynamic programming over options of small reduced cost."""
    slack = 1e-12 * max(value, 1e-300)
    lowest = [float((c + multiplier * s).min()) for s, c in zip(sizes, costs, strict=True)]
    gap = value - (math.fsum(lowest) - multiplier * budget) + slack
    reduced = [c + multiplier * s - low for s, c, low in zip(sizes, costs, lowest, strict=True)]
    near = [np.flatnonzero(r <= gap) for r in reduced]
    order = sorted(range(len(sizes)), key=lambda i: len(near[i]))
    rest = np.cumsum([0.0, *(float(sizes[i][near[i]].min()) for i in reversed(order))])[::-1]  # the least to come
    states = np.zeros((1, 3))  # size, cost, reduced cost
    history: list[tuple[np.ndarray, np.ndarray]] = []
    trimmed = False
    for step, i in enumerate(order):
        options = np.stack([sizes[i], costs[i], reduced[i]], axis=1)[near[i]]
        states, parents, taken, cut = _grown(states, options, gap, budget - rest[step + 1])
        trimmed |= cut
        history.append((parents, near[i][taken]))
        if not len(states):
            return None
    at = int(np.argmin(states[:, 1]))
    best = float(states[at, 1])
    if not best < value and trimmed:
        return None
    picks = [0] * len(sizes)
    for i, (parents, chosen) in zip(reversed(order), reversed(history), strict=True):
        picks[i], at = int(chosen[at]), int(parents[at])
    return _Found(picks, 0.0 if trimmed else best)


def _grown(
    states: np.ndarray, options: np.ndarray, gap: float, room: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Every state with every option of one more layer, less those that are too large, too far from the bound, or beaten
    by another in size and cost.

    Returns:
        The states by ascending size, for each the state and the option that it comes from, and whether some were
        dropped only because there are too many.
    """
    trimmed = len(states) * len(options) > _MOST_AT_ONCE
    kept = np.arange(len(options))
    if trimmed:
        kept = np.argsort(options[:, 2], kind="stable")[: max(_MOST_AT_ONCE // len(states), 1)]
    grown = (states[:, None] + options[kept][None]).reshape(-1, 3)
    good = np.flatnonzero((grown[:, 2] <= gap) & (grown[:, 0] <= room))
    good = good[np.lexsort((grown[good, 1], grown[good, 0]))]
    best = np.minimum.accumulate(grown[good, 1])
    better = np.ones(len(good), dtype=np.bool_)
    better[1:] = best[1:] < best[:-1]
    good = good[better]
    if len(good) > _STATES:
        good = np.sort(good[np.argsort(grown[good, 2], kind="stable")[:_STATES]])
        trimmed = True
    return grown[good], good // len(kept), kept[good % len(kept)], trimmed
