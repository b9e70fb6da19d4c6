"""One option of each group, so that neither size nor error can be less: a multiple-choice knapsack for all budgets.

Sizes and errors add up (for factors give logarithms, for independent errors squares). Groups are taken in one after
another; of the sums so far those stay that no other beats in both (Kellerer, Pferschy & Pisinger 2004, section 11.5).
That is exact. Where there are more than ``states`` of them, one stays in each of as many equal intervals of size, the
one with the least error: what comes out can then be had, but something a little better might be missed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = ["Choice", "best_within", "front"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The option taken of each group, and what their sizes and errors add up to."""

    size: float
    error: float
    picks: tuple[int, ...]


def front(groups: Sequence[Sequence[tuple[float, float]]], states: int = 4000) -> list[Choice]:
    """The choices that no other beats in both, by ascending size and so descending error.

    Args:
        groups: for each its options, (size, error); at least one.
        states: how many sums are kept at most.
    """
    size, error = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for group in groups:
        own = np.asarray(group, dtype=np.float64)
        sizes = (size[:, None] + own[None, :, 0]).ravel()
        errors = (error[:, None] + own[None, :, 1]).ravel()
        kept = _thinned(sizes, errors, _undominated(sizes, errors), states)
        size, error = sizes[kept], errors[kept]
        steps.append((kept // len(own), kept % len(own)))
    picks = np.empty((len(size), len(steps)), dtype=np.int64)
    at = np.arange(len(size))
    for i in range(len(steps) - 1, -1, -1):
        parents, options = steps[i]
        picks[:, i] = options[at]
        at = parents[at]
    return [Choice(float(s), float(e), tuple(map(int, p))) for s, e, p in zip(size, error, picks, strict=True)]


def _undominated(sizes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    order = np.lexsort((errors, sizes))
    best = np.minimum.accumulate(errors[order])
    keep = np.ones(len(order), dtype=np.bool_)
    keep[1:] = best[1:] < best[:-1]
    found: np.ndarray = order[keep & np.isfinite(errors[order])]
    return found


def _thinned(sizes: np.ndarray, errors: np.ndarray, kept: np.ndarray, states: int) -> np.ndarray:
    """Of ``kept``, by ascending size, the first, and the last of each of ``states`` intervals."""
    if len(kept) <= states:
        return kept
    span = sizes[kept]
    interval = np.floor((span - span[0]) / (span[-1] - span[0]) * (states - 1)).astype(np.int64)
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    found: np.ndarray = kept[last]
    return found


def best_within(choices: Sequence[Choice], budget: float) -> Choice | None:
    """Of a :func:`front` the one with the least error whose size is within ``budget``; ``None`` if none is."""
    fitting = [c for c in choices if c.size <= budget + 1e-12]
    return fitting[-1] if fitting else None
