"""The scales of all classes at once, from how large what is written and what is read is.

With R_i what a channel i is measured by where it is written, and C_i the largest weight that reads it, a scale s_i
turns them into R_i / s_i and C_i s_i. They are balanced when ``R_i^a = C_i^b``, a + b = 1, so that

    s_i = R_i^a / C_i^b.

A row of one stream is made of columns of another, so streams are visited in turn until none moves. Scales are powers
of two (dividing and multiplying by these rounds nothing, so that the outputs keep their bits), or any number. What is
balanced to within half a power of two, or to 1%, is left alone; so nothing is found in what is balanced already.

It ends. With a = b = 1/2 and R_i the largest weight that writes i, a move makes all weights smaller that are as large
as the larger of R_i and C_i, and none as large as that, so that the sorted weights only ever go down. With an R_i that
is measured, s_i depends on later streams alone, which are visited first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fxcompress.analysis.channels.atoms import FIXED, Ids
from fxcompress.passes.quantization.streams import Part, Streams

__all__ = ["Balance"]

Reals = npt.NDArray[np.float64]
_DEAD = 2.0**-16
"""A channel that is smaller than the largest of its stream by this is taken for dead: it keeps its scale."""


@dataclasses.dataclass(eq=False)
class _Matrix:
    """How large the weight of a part is, ``(groups, rows, columns)``, and the classes of both."""

    sizes: Reals
    rows: Ids
    columns: Ids

    def row_sizes(self) -> Reals:
        """Of each row the largest."""
        found: Reals = self.sizes.max(2).ravel()
        return found

    def column_sizes(self) -> Reals:
        """Of each column the largest."""
        found: Reals = self.sizes.max(1).ravel()
        return found

    def scale(self, by: Reals) -> None:
        """Scale by a number for each class."""
        groups = len(self.sizes)
        self.sizes *= by[self.columns].reshape(groups, 1, -1) / by[self.rows].reshape(groups, -1, 1)


class Balance:
    """The state of all streams while they are balanced.

    Args:
        streams: what there is.
        written: for each class how large it is where it is written, if that is not the largest weight.
        share: the exponent a.
        powers_of_two: whether scales are.
    """

    def __init__(self, streams: Streams, written: Reals | None, share: float, powers_of_two: bool) -> None:
        self._streams = streams
        self._written = None if written is None else written.copy()
        self._share = share
        self._powers_of_two = powers_of_two
        self._tolerance = 0.51 if powers_of_two else 0.0144
        self.exponents: Reals = np.zeros(streams.count)
        """The logarithms, to base 2, of the scales found so far."""
        self._matrices = [m for part in streams.parts if (m := _matrix_of(part)) is not None]

    def run(self, iterations: int) -> None:
        """Visit all streams until none moves, or so many times."""
        batches = list(self._batches())
        for _ in range(iterations):
            moved = [self._visit(batch) for batch in batches]
            if not any(moved):
                return

    def _batches(self) -> Iterator[Ids]:
        """Classes that may move together, as none is written by what reads another; of later streams first."""
        first = np.zeros(self._streams.count, dtype=np.int64)
        for number in range(len(self._streams.parts), 0, -1):
            first[self._streams.parts[number - 1].rows] = number
        first[FIXED] = 0
        for number in sorted({int(n) for n in first} - {0}, reverse=True):
            together = np.flatnonzero(first == number)
            if any(np.isin(m.rows, together).any() and np.isin(m.columns, together).any() for m in self._matrices):
                yield from together[:, None]
            else:
                yield together

    def _visit(self, batch: Ids) -> bool:
        touched = [m for m in self._matrices if np.isin(m.rows, batch).any() or np.isin(m.columns, batch).any()]
        written, read = np.zeros(self._streams.count), np.zeros(self._streams.count)
        for matrix in touched:
            np.maximum.at(written, matrix.rows, matrix.row_sizes())
            np.maximum.at(read, matrix.columns, matrix.column_sizes())
        if self._written is not None:
            written = self._written
        moves = np.zeros(self._streams.count)
        moves[batch] = self._moves(written[batch], read[batch])
        if not moves.any():
            return False
        self.exponents += moves
        by = np.exp2(moves)
        for matrix in touched:
            matrix.scale(by)
        if self._written is not None:
            self._written = self._written / by
        return True

    def _moves(self, written: Reals, read: Reals) -> Reals:
        live = (written > written.max() * _DEAD) & (read > read.max() * _DEAD)
        logs = self._share * np.log2(written, where=live, out=np.zeros_like(written))
        logs -= (1 - self._share) * np.log2(read, where=live, out=np.zeros_like(read))
        logs[np.abs(logs) <= self._tolerance] = 0
        return np.round(logs) if self._powers_of_two else logs


def _matrix_of(part: Part) -> _Matrix | None:
    sizes = part.magnitudes()
    return None if sizes is None else _Matrix(sizes.numpy(), part.rows, part.columns)
