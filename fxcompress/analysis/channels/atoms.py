"""Atoms: the smallest things that pruning removes whole, and which of them live and die together."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FIXED", "Atoms", "Ids", "Mask"]

Ids: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

FIXED = 0
"""The label of what can never be removed: constants, inputs, outputs."""

_NEVER = np.iinfo(np.int64).max


class Atoms:
    """A union-find over numbered atoms, vectorised over arrays of them.

    An atom is one index of one dimension of one parameter or buffer. Uniting two says that neither goes without the
    other. Number 0 is no atom but stands for all that is fixed: what is united with it is frozen, for the reason given.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1, dtype=np.int64)
        self._reason: Ids = np.full(1, _NEVER)
        self._inexact: Mask = np.zeros(1, dtype=np.bool_)
        self._made: Mask = np.zeros(1, dtype=np.bool_)  # true at the root if it is at any of the class
        self._used = 1
        self.reasons: list[str] = []

    def __len__(self) -> int:
        return self._used

    def new(self, count: int) -> Ids:
        """``count`` fresh atoms."""
        start, self._used = self._used, self._used + count
        if self._used > len(self._parent):
            size = max(self._used, 2 * len(self._parent))
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), size)])
            self._reason = np.concatenate([self._reason, np.full(size - len(self._reason), _NEVER)])
            more = np.zeros(size - len(self._inexact), dtype=np.bool_)
            self._inexact, self._made = (np.concatenate([old, more]) for old in (self._inexact, self._made))
        return np.arange(start, self._used)

    def find(self, ids: Ids) -> Ids:
        """The representative of the class of each atom; of the same shape."""
        root = self._parent[ids]
        while True:
            above = self._parent[root]
            if (above == root).all():
                break
            root = above
        self._parent[ids] = root
        return root

    def unite(self, a: Ids, b: Ids, reason: str) -> None:
        """Unite ``a`` and ``b`` element by element (they broadcast); ``reason`` is why those are frozen that meet 0."""
        a, b = (side.ravel() for side in np.broadcast_arrays(a, b))
        fixed_a, fixed_b = a == FIXED, b == FIXED
        if fixed_a.any() or fixed_b.any():
            self.freeze(np.concatenate([a[fixed_b], b[fixed_a]]), reason)
            movable = ~(fixed_a | fixed_b)
            a, b = a[movable], b[movable]
        a, b = self.find(a), self.find(b)
        while (differ := a != b).any():
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)  # a root hangs below the lowest of those that it meets
            self._made[self.find(high[self._made[high]])] = True
            a, b = self.find(a), self.find(b)

    def tie(self, ids: Ids, axis: int, reason: str = "") -> None:
        """Unite the atoms of ``ids`` along ``axis``."""
        if ids.shape[axis] > 1:
            self.unite(ids, np.take(ids, [0], axis=axis), reason)

    def freeze(self, ids: Ids, reason: str) -> None:
        """Never remove ``ids``; the reason given first is the one that is kept."""
        ids = ids[ids != FIXED]
        if len(ids):
            self.reasons.append(reason)
            np.minimum.at(self._reason, ids, len(self.reasons) - 1)

    def are_frozen(self, ids: Ids) -> bool:
        """Whether each of ``ids`` has been frozen under its own number."""
        return bool(((ids == FIXED) | (self._reason[ids] != _NEVER)).all())

    def mark_inexact(self, ids: Ids) -> None:
        """Removing ``ids`` is not the same as setting them to zero (a mean or a norm runs over them)."""
        self._inexact[ids] = True

    def mark_made(self, ids: Ids) -> None:
        """A layer makes ``ids``: they are channels, and do not just lie along them."""
        self._made[self.find(ids)] = True
        self._made[FIXED] = False

    def any_made(self, ids: Ids) -> bool:
        """Whether any of ``ids`` is in the class of something that a layer makes."""
        return bool(self._made[self.find(ids)].any())

    def summary(self) -> tuple[Ids, Ids, Mask]:
        """For every atom its representative, the number of the reason why its class is frozen (or -1), and whether its
        class is exact."""
        root = self.find(np.arange(self._used))
        reason, inexact = np.full(self._used, _NEVER), np.zeros(self._used, dtype=np.bool_)
        np.minimum.at(reason, root, self._reason[: self._used])
        np.logical_or.at(inexact, root, self._inexact[: self._used])
        reason[reason == _NEVER] = -1
        reason[FIXED] = 0
        return root, reason[root], ~inexact[root]
