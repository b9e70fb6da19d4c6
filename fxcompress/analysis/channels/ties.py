"""What is tied to what, and what waits until the run is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from fxcompress.analysis.channels.atoms import FIXED, Atoms, Ids
from fxcompress.analysis.channels.maps import Grouping, Labelled, Map, Product

__all__ = ["Ties"]


class Ties:
    """The atoms of one run, what ties them, and what is only settled when the run is over.

    Args:
        heads: whether an attention loses whole heads, rather than a part of every head.
    """

    def __init__(self, heads: bool) -> None:
        self.atoms = Atoms()
        self.heads = heads
        self.place = ""
        """Where the run is, for reasons."""
        self.products: list[Product] = []
        """The contractions of the call that is running; the runner takes them away."""
        self.produced: list[Ids] = []
        """The channels that layers of the call that is running have made; the runner takes them away."""
        self._late: list[tuple[Ids, str]] = []
        self._groupings: list[Grouping] = []
        self._joint: list[Map] = []

    # ------------------------------------------------------------------------------------------------- maps
    def vector(self, x: Labelled, dim: int) -> Ids:
        """The atoms along ``dim``, of shape ``(size,)``; those that differ along other dimensions are tied."""
        found = x.about(dim)
        if found is None:
            return np.full(x.shape[dim], FIXED)
        return self._tied(found, found.dims - {dim}).ids.reshape(-1)

    def along(self, ids: Ids, dim: int, rank: int) -> Map:
        """A map of ``ids``, of shape ``(size,)``, along ``dim`` of a tensor of that rank."""
        return Map(ids.reshape([-1 if d == dim else 1 for d in range(rank)]), frozenset([dim]))

    def _tied(self, m: Map, dims: Iterable[int]) -> Map:
        """``m`` with the atoms tied along ``dims``, about which it then no longer is."""
        ids, dims = m.ids, frozenset(dims)
        for dim in dims:
            self.atoms.tie(ids, dim)
            ids = np.take(ids, [0], axis=dim)
        return Map(ids, m.dims - dims)

    def keep_one(self, m: Map, keep: int | None = None) -> Map:
        """``m`` tied along all of its dimensions but ``keep``, or that along which most differ."""
        m = self.simplified(m)
        if len(m.dims) < 2:
            return m
        if keep is None or keep not in m.dims:
            keep = max(sorted(m.dims), key=lambda d: m.ids.shape[d])
        return self._tied(m, m.dims - {keep})

    def simplified(self, m: Map) -> Map:
        """``m`` without dimensions along which its atoms have been tied since."""
        if len(m.dims) < 2:
            return m
        ids, dims = self.atoms.find(m.ids), m.dims
        for dim in sorted(m.dims):
            if len(dims) > 1 and bool((ids == np.take(ids, [0], axis=dim)).all()):
                ids, dims = np.take(ids, [0], axis=dim), dims - {dim}
        return Map(ids, dims)

    def produce(self, ids: Ids) -> None:
        """A layer of the call that is running makes these channels."""
        self.produced.append(ids)
        self.atoms.mark_made(ids)

    def freeze_late(self, ids: Ids, reason: str) -> None:
        """Freeze ``ids`` when the run is over, so that any other reason counts first."""
        self._late.append((ids, reason))

    def freeze(self, x: Any, reason: str) -> None:
        """Freeze what ``x``, or whatever is labelled in it, is made of."""
        for m in x.maps:
            self.atoms.freeze(m.ids.ravel(), reason)

    def freeze_along(self, x: Labelled, dims: Iterable[int], reason: str) -> Labelled:
        """``x`` with what is labelled along any of ``dims`` frozen, and no longer labelled."""
        dims = frozenset(dims)
        for m in x.maps:
            if m.dims & dims:
                self.atoms.freeze(m.ids.ravel(), reason)
        return dataclasses.replace(x, maps=tuple(m for m in x.maps if not m.dims & dims))

    def settle(self) -> None:
        """The run is over: freeze what was left for now, and tie what is still joint, so that every removal leaves
        rectangles."""
        for ids, reason in self._late:
            self.atoms.freeze(ids, reason)
        for grouping in self._groupings:
            self._settle_grouping(grouping)
        while self._joint:
            pending, self._joint = self._joint, []
            for m in pending:
                self.keep_one(m)

    # ------------------------------------------------------------------------------------------------- groups
    def group(self, grouping: Grouping) -> None:
        """Which way a grouping goes is settled when the run is over, by what leaves more to choose from; but where a
        group has one channel there is no choice."""
        if grouping.entering.shape[1] == 1:
            self._take_whole(grouping)
        else:
            self._groupings.append(grouping)

    def _settle_grouping(self, g: Grouping) -> None:
        if self._left(g.entering, 1) >= self._left(g.entering, 0):
            self._take_whole(g)
            return
        for ids in (g.entering, g.leaving):
            self.atoms.tie(ids, 0)
        for outer, within in ((g.entering, g.within_in), (g.leaving, g.within_out)):
            if within is not None:
                self.atoms.unite(outer[0], within, g.why)
        if not g.exact:
            self.atoms.mark_inexact(g.entering.ravel())

    def _take_whole(self, g: Grouping) -> None:
        for ids in (g.entering, g.leaving):
            self.atoms.tie(ids, 1)
        self.atoms.unite(g.entering[:, 0], g.leaving[:, 0], g.why)
        for within in (g.within_in, g.within_out):
            if within is not None:
                self.atoms.freeze(within, f"within a group of {g.place}, which loses whole groups")

    def _left(self, ids: Ids, axis: int) -> int:
        """How many classes are left if ``ids`` are tied along ``axis``."""
        roots, numbers = np.unique(self.atoms.find(ids), return_inverse=True)
        trial = Atoms()
        trial.new(len(roots))
        tied = numbers.reshape(ids.shape) + 1
        trial.tie(tied, axis)
        return len(np.unique(trial.find(tied.ravel())))

    def _noted(self, m: Map) -> Map:
        m = self.simplified(m)
        if len(m.dims) > 1:
            self._joint.append(m)
        return m

    def tie_along(self, x: Labelled, dim: int) -> Labelled:
        """``x`` after its atoms have been tied along ``dim``; frozen if ``dim`` is all that they differ with."""
        m = x.about(dim)
        if m is None:
            return x
        others = tuple(n for n in x.maps if n is not m)
        if m.dims == {dim}:
            self.atoms.freeze(m.ids.ravel(), f"taken apart by {self.place}")
            return dataclasses.replace(x, maps=others, why=f"what is taken apart by {self.place}")
        return dataclasses.replace(x, maps=(self._tied(m, {dim}), *others))
