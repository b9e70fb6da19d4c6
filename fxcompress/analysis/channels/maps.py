"""What labels are: maps of atoms, one for each dimension of a value along which something could go."""

from __future__ import annotations

import dataclasses

from fxcompress.analysis.channels.atoms import Ids

__all__ = ["Grouping", "Labelled", "Map", "Product"]


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """The atoms of the elements of a tensor, along some of its dimensions.

    Attributes:
        ids: atoms, of the rank of the tensor; of its size along ``dims``, of size 1 along the others.
        dims: the dimensions with which the atoms change by construction. More than one: a dimension that was split, of
            which pruning must leave a rectangle; which side of it goes is settled by what happens to it.
    """

    ids: Ids
    dims: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """What is known of one tensor in place of its values.

    Attributes:
        shape: of the tensor.
        maps: at most one for each dimension; dimensions that no map is about are fixed.
        why: why those are.
        zero: whether elements of removed atoms are zero once all that belongs to these atoms is set to zero.
    """

    shape: tuple[int, ...]
    maps: tuple[Map, ...] = ()
    why: str = ""
    zero: bool = False

    def about(self, dim: int) -> Map | None:
        """The map of dimension ``dim``, which is not negative."""
        return next((m for m in self.maps if dim in m.dims), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One contraction: its multiply-accumulates, and the atoms along each dimension that they are a product of."""

    macs: int
    vectors: tuple[Ids, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """Channels in groups, of which either whole ones go or the same part of every one.

    Attributes:
        entering: atoms of the channels that come in, of shape ``(groups, width)``.
        leaving: atoms of those that come out, of shape ``(groups, width)``; ``entering`` itself for a norm.
        why, place: for reasons.
        within_in, within_out: atoms of a weight that lie along the width of what comes in or out.
        exact: whether the same part of every group can be removed exactly.
    """

    entering: Ids
    leaving: Ids
    why: str
    place: str
    within_in: Ids | None = None
    within_out: Ids | None = None
    exact: bool = True
