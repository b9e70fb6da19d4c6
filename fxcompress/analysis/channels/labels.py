"""Labels: what operations do to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fxcompress.analysis.channels.atoms import FIXED, Ids
from fxcompress.analysis.channels.maps import Labelled, Map, Product
from fxcompress.analysis.channels.ties import Ties

__all__ = ["Labels"]


class Labels(Ties):
    """What operations do to labels. Each method takes what an operation is given and returns what it gives."""

    # ------------------------------------------------------------------------------------------------- movement
    def move(self, inputs: Sequence[Labelled], op: Callable[..., Any]) -> Any:
        """Run ``op``, which only moves elements, on where they are; the result has a :class:`Labelled` per tensor.

        What differs along a dimension along which no input does is tied (``cat`` along another dimension than the
        labelled one), as nothing could be removed along it.

        Args:
            inputs: the tensors that it moves.
            op: takes as many integer tensors of their shapes.
        """
        pairs = self._side_by_side(inputs)  # in the order of their dimensions
        outs: list[Any] = [self._moved(inputs, maps, op) for maps in pairs]
        if outs:
            return _zip(outs, self._merged)
        why = next((x.why for x in inputs if x.why), "")
        return _map(op(*[torch.zeros(1, dtype=torch.int64).expand(x.shape) for x in inputs]), lambda t: _bare(t, why))

    def _side_by_side(self, inputs: Sequence[Labelled]) -> list[list[Map | None]]:
        """Maps of several inputs that are about the same dimensions, together: one list for each set of dimensions."""
        if len(inputs) == 1:
            return [[m] for m in sorted(inputs[0].maps, key=lambda m: min(m.dims))]
        rows: list[list[Map | None]] = []
        taken: set[int] = set()
        for x in inputs:
            for m in x.maps:
                if id(m) not in taken:
                    row = [next((n for n in y.maps if n.dims & m.dims and id(n) not in taken), None) for y in inputs]
                    taken |= {id(n) for n in row if n is not None}
                    rows.append(row)
        return rows

    def _moved(self, inputs: Sequence[Labelled], maps: Sequence[Map | None], op: Callable[..., Any]) -> Any:
        flat: list[Ids] = [np.full(1, FIXED)]
        positions = []
        for x, m in zip(inputs, maps, strict=True):
            if m is None:
                positions.append(torch.zeros(1, dtype=torch.int64).expand(x.shape))
                continue
            start = sum(len(part) for part in flat)
            where = torch.arange(start, start + m.ids.size).reshape(m.ids.shape)
            flat.append(m.ids.ravel())
            positions.append(where.expand(x.shape))
        ids = np.concatenate(flat)
        known = frozenset().union(*(m.dims for m in maps if m is not None))
        why = next((x.why for x in inputs if x.why), "")
        zero = all(x.zero for x in inputs)

        def back(where: torch.Tensor) -> Labelled:
            small, dims = _shrunk(where)
            shape = tuple(where.shape)
            if not dims:
                self.atoms.freeze(ids[small.numpy().ravel()], f"a single element of it is picked by {self.place}")
                return Labelled(shape, (), f"picked by {self.place}", zero)
            m = Map(ids[small.numpy()], dims)
            if len(inputs) > 1 and dims - known and dims & known:
                m = self._tied(m, dims - known)
            return Labelled(shape, (self._noted(m),), why, zero)

        return _map(op(*positions), back)

    def _merged(self, parts: Sequence[Labelled]) -> Labelled:
        """The maps of all ``parts``. Where two were merged into one dimension only one can be kept: that of channels,
        and of heads against what each head has."""
        maps: list[Map] = []
        found = [m for x in (parts if self.heads else reversed(parts)) for m in x.maps]
        for m in sorted(found, key=lambda m: not self.atoms.any_made(m.ids)) if len(found) > 1 else found:
            if any(m.dims & n.dims for n in maps):
                self.atoms.freeze(m.ids.ravel(), f"merged with another dimension by {self.place}")
            else:
                maps.append(m)
        return Labelled(parts[0].shape, tuple(maps), parts[0].why, all(x.zero for x in parts))

    # ------------------------------------------------------------------------------------------------- arithmetic
    def elementwise(self, operands: Sequence[Labelled], zero: bool = False) -> Labelled:
        """An operation element by element, with broadcasting."""
        shape = np.broadcast_shapes(*(x.shape for x in operands))
        aligned = [self._aligned(x, len(shape)) for x in operands]
        aligned = [self._single_where_needed(x, aligned) for x in aligned]
        out: list[Map] = []
        for x in aligned:
            for m in x.maps:
                for other in aligned:
                    if other is not x:
                        self._meet(m, other)
                if not any(n.dims & m.dims for n in out):
                    out.append(m)
                elif n := next((n for n in out if m.dims > n.dims and len(m.dims) > 1), None):
                    out[out.index(n)] = m
        why = next((x.why for x in operands if x.why), "")
        return Labelled(shape, tuple(self._noted(m) for m in out), why, zero)

    def _aligned(self, x: Labelled, rank: int) -> Labelled:
        extra = rank - len(x.shape)
        if not extra:
            return x
        maps = tuple(
            Map(m.ids.reshape((1,) * extra + m.ids.shape), frozenset(d + extra for d in m.dims)) for m in x.maps
        )
        return dataclasses.replace(x, shape=(1,) * extra + x.shape, maps=maps)

    def _single_where_needed(self, x: Labelled, operands: Sequence[Labelled]) -> Labelled:
        """``x`` with joint maps settled where another operand has a map for each of several of their dimensions, or
        lies along the very one that is not to go: what a norm or a rotation does to all heads alike stays as it is."""
        maps = []
        for m in x.maps:
            for y in operands:
                met = [n for n in y.maps if n.dims & m.dims]
                if len(m.dims) < 2:
                    break
                if len(met) > 1:
                    m = self.keep_one(m, min(m.dims) if self.heads else max(m.dims))
                    continue
                staying = {max(m.dims) if self.heads else min(m.dims)}
                if len(m.dims) == 2 and met and met[0].dims == staying and not self.atoms.any_made(met[0].ids):
                    m = self._tied(m, staying)
            maps.append(m)
        return dataclasses.replace(x, maps=tuple(maps))

    def _meet(self, m: Map, other: Labelled) -> None:
        met = [n for n in other.maps if n.dims & m.dims]
        for n in met:
            self.atoms.unite(m.ids, n.ids, other.why)
        if not met and any(other.shape[d] > 1 for d in m.dims):
            self.atoms.freeze(m.ids.ravel(), f"combined by {self.place} with {other.why or 'something fixed'}")

    def zero_wherever(self, x: Labelled, out: Labelled) -> bool:
        """Whether ``x`` is zero wherever atoms go from ``out``, to which it broadcasts: what has no labels stays."""
        extra = len(out.shape) - len(x.shape)
        mine = {d + extra for m in x.maps for d in m.dims}
        return x.zero and all(m.dims <= mine or self.atoms.are_frozen(m.ids.ravel()) for m in out.maps)

    def spread(self, x: Labelled, dims: Iterable[int], drop: bool, exact: bool) -> Labelled:
        """A reduction over ``dims``, which are dropped or stay with size 1.

        What differs along a reduced dimension and another is tied along the former; what differs along the reduced
        ones only is used up.
        """
        dims = frozenset(dims)
        maps = []
        for m in x.maps:
            if m.dims <= dims:
                if not (exact and x.zero):
                    self.atoms.mark_inexact(m.ids.ravel())
                continue
            if m.dims & dims and not (exact and x.zero):
                self.atoms.mark_inexact(m.ids.ravel())
            maps.append(self._tied(m, m.dims & dims))
        shape = tuple(1 if d in dims else s for d, s in enumerate(x.shape))
        out = Labelled(shape, tuple(maps), x.why, x.zero and exact)
        return self._dropped(out, dims) if drop else out

    def _dropped(self, x: Labelled, dims: frozenset[int]) -> Labelled:
        kept = [d for d in range(len(x.shape)) if d not in dims]
        number = {d: i for i, d in enumerate(kept)}
        maps = tuple(
            Map(m.ids.reshape([m.ids.shape[d] for d in kept]), frozenset(number[d] for d in m.dims)) for m in x.maps
        )
        return dataclasses.replace(x, shape=tuple(x.shape[d] for d in kept), maps=maps)

    def inexact_along(self, x: Labelled, dims: Iterable[int]) -> None:
        """Something is normalised over ``dims``: removing is not the same as setting to zero."""
        dims = frozenset(dims)
        for m in x.maps:
            if m.dims & dims:
                self.atoms.mark_inexact(m.ids.ravel())

    # ------------------------------------------------------------------------------------------------- products
    def einsum(self, operands: Sequence[Labelled], letters: Sequence[Sequence[Any]], out: Sequence[Any]) -> Labelled:
        """A sum of products: each dimension of each operand has a letter, dimensions of one letter go together, and
        those that are not in ``out`` are summed over.

        Args:
            operands: what is multiplied.
            letters: for each operand, the letter of each dimension.
            out: the letters of the result. An operand of size 1 along a letter is broadcast.
        """
        sizes = {k: s for x, names in zip(operands, letters, strict=True) for k, s in zip(names, x.shape, strict=True)}
        for x, names in zip(operands, letters, strict=True):
            sizes |= {k: s for k, s in zip(names, x.shape, strict=True) if s > 1}
        settled = [self._without_joint(i, operands, letters, out) for i in range(len(operands))]
        vectors: dict[Any, Ids] = {}
        zeros: dict[Any, bool] = {}
        for letter, size in sizes.items():
            holders = [
                (x, list(names).index(letter))
                for x, names in zip(settled, letters, strict=True)
                if letter in names and x.shape[list(names).index(letter)] > 1
            ]
            found = [(self.vector(x, d), x) for x, d in holders]
            if not any((v != FIXED).any() for v, _ in found):
                continue
            first = found[0][0]
            for v, x in found:
                self.atoms.unite(first, v, f"multiplied by {self.place} with {x.why or found[0][1].why}")
            vectors[letter] = next((v for v, _ in found if (v != FIXED).any()), first)
            assert len(vectors[letter]) == size
            zeros[letter] = any(x.zero for x, _ in holders)
            if letter not in out and not zeros[letter]:
                self.atoms.mark_inexact(vectors[letter])
        self.products.append(Product(math.prod(sizes.values()), tuple(vectors.values())))
        maps = tuple(self.along(vectors[k], i, len(out)) for i, k in enumerate(out) if k in vectors)
        why = next((x.why for x in operands if x.why), "")
        zero = all(zeros[k] or self.atoms.are_frozen(vectors[k]) for k in out if k in vectors)
        return Labelled(tuple(sizes[k] for k in out), maps, why, zero)

    def _without_joint(
        self, index: int, operands: Sequence[Labelled], letters: Sequence[Sequence[Any]], out: Sequence[Any]
    ) -> Labelled:
        """Operand ``index`` with joint maps settled: heads (batch letters) against what each head has."""
        x, names = operands[index], letters[index]
        maps = []
        for m in x.maps:
            m = self.simplified(m)
            shared = {d for d in m.dims if any(names[d] in other for j, other in enumerate(letters) if j != index)}
            batch = {d for d in shared if names[d] in out}
            if len(m.dims) > 1 and batch and m.dims - batch:
                possible = all(
                    self._labelled(y, other, names[d])
                    for d in batch
                    for y, other in zip(operands, letters, strict=True)
                )
                m = self._tied(m, m.dims - batch if self.heads and possible else batch)
            maps.append(self.keep_one(m, next(iter(sorted(shared & m.dims)), None)))
        return dataclasses.replace(x, maps=tuple(maps))

    @staticmethod
    def _labelled(x: Labelled, names: Sequence[Any], letter: Any) -> bool:
        if letter not in names:
            return True
        dim = list(names).index(letter)
        return x.shape[dim] == 1 or x.about(dim) is not None


def _bare(tensor: torch.Tensor, why: str) -> Labelled:
    return Labelled(tuple(tensor.shape), (), why)


def _shrunk(where: torch.Tensor) -> tuple[torch.Tensor, frozenset[int]]:
    """``where`` with size 1 along the dimensions in which it is constant, and the other dimensions."""
    dims = []
    for dim, size in enumerate(where.shape):
        if size > 1 and where.stride(dim) == 0:
            where = where.narrow(dim, 0, 1)
    for dim, size in enumerate(where.shape):
        if size <= 1:
            continue
        first = where.narrow(dim, 0, 1)
        if bool((where.narrow(dim, 1, 1) != first).any()) or bool((where != first).any()):
            dims.append(dim)
        else:
            where = first
    return where, frozenset(dims)


def _map(value: Any, change: Callable[[torch.Tensor], Labelled]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(change(v) for v in value) if isinstance(value, (tuple, list)) else value


def _zip(values: Sequence[Any], merge: Callable[[Sequence[Labelled]], Labelled]) -> Any:
    if isinstance(values[0], Labelled):
        return merge(values)
    return type(values[0])(merge(parts) for parts in zip(*values, strict=True))
