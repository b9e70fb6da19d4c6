"""Which channels go: from scores and a target to what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fxcompress.analysis.channels import Group
from fxcompress.errors import PreconditionError

__all__ = ["Candidate", "Selection", "reach"]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may lose channels.

    Attributes:
        group: the group.
        order: its channels, the least important first.
        scores: their scores in this order; comparable among the candidates of one ``cluster``.
        cluster: candidates of one cluster are ranked together.
        ratio: the fraction to remove if it is not to be chosen.
        least: how many channels must stay.
        step: as many channels as are left must be a multiple of this, where there are that many.
    """

    group: Group
    order: np.ndarray
    scores: np.ndarray
    cluster: str
    ratio: float | None
    least: int
    step: int

    def allowed(self, removed: int) -> int:
        """The largest number up to ``removed`` (rounded up to the next step if that is nearer) that may go."""
        channels = self.group.channels
        left = channels - removed
        if self.step > 1 and channels >= self.step:
            left = max(self.step, int(left / self.step + 0.5) * self.step)
        return channels - min(channels, max(left, self.least))


class Selection:
    """How many channels each candidate loses at a strength between 0 and 1."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates
        self._ranks: dict[int, np.ndarray] = {}
        self._sizes: dict[str, int] = {}
        for cluster in dict.fromkeys(c.cluster for c in candidates if c.ratio is None):
            inside = [c for c in candidates if c.cluster == cluster and c.ratio is None]
            scores = np.concatenate([c.scores for c in inside])
            # Of equal scores those go first that come first in their group, as a part of it.
            places = np.concatenate([np.arange(len(c.scores)) / len(c.scores) for c in inside])
            ranks = np.empty(len(scores), dtype=np.int64)
            ranks[np.lexsort((places, scores))] = np.arange(len(scores))
            parts = np.split(ranks, np.cumsum([len(c.scores) for c in inside])[:-1])
            self._ranks |= {id(c): np.sort(part) for c, part in zip(inside, parts, strict=True)}
            self._sizes[cluster] = len(scores)

    def counts(self, strength: float) -> list[int]:
        """Channels that each candidate loses: the fraction ``strength`` of each cluster, its least important."""
        return [c.allowed(self._count(c, strength)) for c in self.candidates]

    def _count(self, c: Candidate, strength: float) -> int:
        if c.ratio is not None:
            return int(c.ratio * c.group.channels + 1e-9)
        number = int(strength * self._sizes[c.cluster] + 1e-9)
        return int(np.searchsorted(self._ranks[id(c)], number))

    def floored(self, counts: Sequence[int]) -> list[Candidate]:
        """Those of which ``counts`` leaves no more than must stay."""
        pairs = zip(self.candidates, counts, strict=True)
        return [c for c, n in pairs if n > 0 and c.group.channels - n <= c.least]

    def kept(self, counts: Sequence[int], classes: int) -> np.ndarray:
        """Of ``classes`` classes, which stay; boolean, of shape ``(classes,)``."""
        kept = np.ones(classes, dtype=np.bool_)
        for c, n in zip(self.candidates, counts, strict=True):
            kept[c.group.classes[c.order[:n]]] = False
        return kept


def reach(selection: Selection, target: float, size: Callable[[Sequence[int]], int], what: str) -> list[int]:
    """The fewest channels with which ``size`` falls by the fraction ``target``.

    Bisects over the strength, then goes from the last strength that is too weak to the first that is not one channel
    (or step of channels) at a time.

    Raises:
        PreconditionError: it cannot be reached; the message says what can.
    """
    whole = size([0] * len(selection.candidates))
    wanted = (1 - target) * whole
    strongest = size(selection.counts(1.0))
    if strongest > wanted:
        raise PreconditionError(
            f"{target:.0%} of the {what} cannot be removed: without all channels that may go, "
            f"{1 - strongest / whole:.1%} are gone. Lower `ratio` or `min_channels`, or exclude less"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if size(selection.counts(middle)) <= wanted else (middle, high)
    counts, enough = selection.counts(low), selection.counts(high)
    for i, (c, n) in enumerate(zip(selection.candidates, enough, strict=True)):
        while counts[i] < n:
            counts[i] = next(k for k in (c.allowed(r) for r in range(counts[i] + 1, n + 1)) if k > counts[i])
            if size(counts) <= wanted:
                return counts
    return enough
