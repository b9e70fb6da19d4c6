"""The weights with which a layer best gives what it is to give from what it reads: least squares, layer by layer.

With x a row of what the layer reads (for a convolution the patch under the kernel at one place), y what it is to give
there, W and b what it has, D and s the change::

    minimise over D, s:   sum |y - (W + D) x - (b + s)|^2  +  ridge |D|^2

    D (G + ridge I) = C,   G = sum (x - mean x)(x - mean x)',   C = sum (r - mean r)(x - mean x)',   r = y - W x - b

and s = mean r - D mean x. A layer without a bias keeps none; there s = 0 and the sums are not centred. Everything is in
float64. Each group of a grouped convolution is a problem of its own.

**The ridge** draws towards the weights as they are and not to zero: what the data say nothing about stays. It is
``lambda * mean(diag G)``, with a lambda for each layer: every fourth sample is held out, the others are fitted with
lambda = 100, 10, 1, 0.1 ... until the error on those held out grows, and the best lambda is used with all samples. If
none is better on what was held out than the weights as they are, these stay. As D = 0 is among what the minimum is
taken over, the error on the data never grows.

**Rows** are at most 64 places of each sample (each index of the first dimension), drawn from a fixed seed. Where they
are fewer than the unknowns, the problem is solved in the space that they span, which is where its solution lies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxcompress.analysis.moments import as_double
from fxcompress.analysis.patches import PLACES, Readable, output_places, rows_at, some_places

__all__ = ["NotRefitted", "Refit", "Sums", "refit"]

_ONE_IN = 4
"""One sample in as many is held out."""
_RIDGES = tuple(10.0**-i for i in range(-2, 13))


class NotRefitted(Exception):
    """Why a layer stays as it is."""


@dataclasses.dataclass(frozen=True)
class Refit:
    """What the data say of one layer.

    Attributes:
        rows: how many there were.
        weight: as it was, ``(groups, unknowns, outputs)``; float64.
        ridge: the lambda; ``None`` if no change that fits most of the data is better on the rest of it.
        basis: orthonormal columns that span the rows, ``(unknowns, spanned)``; ``None`` if all do.
        total: the sum of ``|y|^2``.
    """

    rows: int
    weight: Tensor
    ridge: float | None
    basis: Tensor | None
    total: float
    _spanned: Sums

    def sums(self) -> Sums:
        """Of rows x and of what is missing at the outputs."""
        return self._spanned if self.basis is None else self._spanned.lifted(self.basis)

    def change(self, least: float = 0.0) -> tuple[Tensor, Tensor] | None:
        """The best D, of the shape of :attr:`weight`, and s, ``(groups, 1, outputs)``; ``None`` if none is good.

        Args:
            least: the lambda if :attr:`ridge` is smaller.
        """
        d = self._best if self.ridge is None or least <= self.ridge else self._spanned.solution(least)
        if d is None:
            return None
        return (d if self.basis is None else self.basis @ d), self._spanned.shift(d)

    @functools.cached_property
    def _best(self) -> Tensor | None:
        """The best D in the coordinates of :attr:`basis`."""
        return None if self.ridge is None else self._spanned.solution(self.ridge)

    def errors(self) -> tuple[float, float]:
        """The norm of what is missing relative to that of y, before and after :meth:`change`."""
        sums = self._spanned
        found = [sums.error(*sums.nothing())] * 2
        if self._best is not None:
            found[1] = sums.error(self._best, sums.shift(self._best))
        return self.relative(found[0]), self.relative(found[1])

    def relative(self, error: float) -> float:
        """The root of ``error``, a sum of squares, relative to the norm of y."""
        return math.sqrt(max(error, 0.0) / self.total) if self.total else 0.0


def refit(layer: Readable, values: list[tuple[Tensor, Tensor]], kept: Tensor | None = None) -> Refit:
    """Look at what ``layer`` reads and is to give.

    Args:
        layer: the layer as it is.
        values: for each batch its input, and what it is to give.
        kept: which channels of the latter the layer has; ``None`` if all.

    Raises:
        NotRefitted: nothing can be worked out.
    """
    rows = _Rows(layer, values, kept)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = as_double(layer.weight)
    w = weight.reshape(groups, len(weight) // groups, -1).mT
    basis = _basis(rows) if groups == 1 and rows.count <= w.shape[1] else None
    fitted, held, total = _moments(layer, rows, w, basis)
    everything = fitted.merged(held)
    if not math.isfinite(everything.error(*everything.nothing())) or not bool(torch.isfinite(everything.gram).all()):
        raise NotRefitted("its values on the calibration data are not finite")
    return Refit(rows.count, w, _ridge(fitted, held), basis, total, everything)


def _moments(layer: Readable, rows: _Rows, w: Tensor, basis: Tensor | None) -> tuple[Sums, Sums, float]:
    """Of inputs and what is missing at the outputs: for rows to fit and for those held out; and the sum of |y|^2."""
    parts: list[Sums | None] = [None, None]
    total = 0.0
    for x, y, hold in rows:
        total += float(y.square().sum())
        r = y.reshape(len(y), len(w), -1).transpose(0, 1) - x @ w
        if layer.bias is not None:
            r = r - as_double(layer.bias).reshape(len(w), 1, -1)
        x = x if basis is None else x @ basis
        for i, some in enumerate((~hold, hold)):
            sums, earlier = Sums.of(x[:, some], r[:, some], layer.bias is not None), parts[i]
            parts[i] = sums if earlier is None else earlier.merged(sums)
    fitted, held = parts
    assert fitted is not None, "there are rows"
    assert held is not None, "there are rows"
    return fitted, held, total


def _ridge(fitted: Sums, held: Sums) -> float | None:
    """The lambda whose fit to the ones is best on the others; ``None`` if that is no better than no change."""
    least, last, best = held.error(*held.nothing()), math.inf, None
    for ridge in _RIDGES:
        d = fitted.solution(ridge)
        error = math.inf if d is None else held.error(d, fitted.shift(d))
        if not error < last:
            break
        last = error
        if error < least:
            least, best = error, ridge
    return best


@dataclasses.dataclass(frozen=True)
class Sums:
    """Moments of rows x and r; two of them merge as Chan, Golub & LeVeque (1979) have it for one variable.

    Attributes:
        count: how many rows.
        mean_x, mean_r: ``(groups, 1, unknowns)`` and ``(groups, 1, outputs)``; zero if not centred.
        gram, cross: sums of ``x x'`` and ``x r'`` about the means; a matrix for each group.
        square: the sum of ``|r|^2`` about the mean.
    """

    count: int
    mean_x: Tensor
    mean_r: Tensor
    gram: Tensor
    cross: Tensor
    square: float

    @classmethod
    def of(cls, x: Tensor, r: Tensor, centred: bool) -> Sums:
        """Of rows ``(groups, rows, unknowns)`` and ``(groups, rows, outputs)``."""
        count = x.shape[1]
        mean_x, mean_r = (v.sum(1, keepdim=True) * (centred / max(count, 1)) for v in (x, r))
        x, r = x - mean_x, r - mean_r
        return cls(count, mean_x, mean_r, x.mT @ x, x.mT @ r, float(r.square().sum()))

    def merged(self, other: Sums) -> Sums:
        """Of the rows of both."""
        count = self.count + other.count
        part, weight = other.count / max(count, 1), self.count * other.count / max(count, 1)
        x, r = other.mean_x - self.mean_x, other.mean_r - self.mean_r
        return Sums(
            count,
            self.mean_x + part * x,
            self.mean_r + part * r,
            self.gram + other.gram + weight * (x.mT @ x),
            self.cross + other.cross + weight * (x.mT @ r),
            self.square + other.square + weight * float(r.square().sum()),
        )

    def solution(self, ridge: float) -> Tensor | None:
        """The best D, of the shape of :attr:`cross`; ``None`` where rounding makes the matrix singular."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        added = ridge * diagonal.mean(1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(added.expand_as(diagonal)))
        return None if bool(failed.any()) else torch.cholesky_solve(self.cross, factor)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """The D and s that change nothing."""
        return torch.zeros_like(self.cross), torch.zeros_like(self.mean_r)

    def shift(self, d: Tensor) -> Tensor:
        """The s that belongs to ``d``."""
        return self.mean_r - self.mean_x @ d

    def error(self, d: Tensor, s: Tensor) -> float:
        """The sum of ``|r - D x - s|^2``."""
        inside = self.square - 2 * (d * self.cross).sum() + (d * (self.gram @ d)).sum()
        return float(inside + self.count * (self.mean_r - self.mean_x @ d - s).square().sum())

    def lifted(self, basis: Tensor) -> Sums:
        """The same of ``basis @ x`` in place of x; ``basis`` is ``(unknowns, spanned)``."""
        return Sums(
            self.count,
            self.mean_x @ basis.mT,
            self.mean_r,
            basis @ self.gram @ basis.mT,
            basis @ self.cross,
            self.square,
        )


class _Rows:
    """The rows of one layer, batch by batch and the same ones every time: ``(groups, rows, unknowns)`` of the input,
    ``(rows, outputs)`` of the original output, and which of them are held out; float64."""

    def __init__(self, layer: Readable, values: list[tuple[Tensor, Tensor]], kept: Tensor | None) -> None:
        self._layer, self._kept = layer, kept
        self._values = [_with_samples(layer, x, y) for x, y in values]
        counts = [(len(y), min(math.prod(_places(layer, y)), PLACES)) for _, y in self._values]
        self.count = sum(n * places for n, places in counts)
        if self.count < _ONE_IN:
            raise NotRefitted(f"the calibration data have {self.count} rows for it")
        self._by_sample = sum(n for n, _ in counts) >= _ONE_IN

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        samples = rows = 0
        for x, y in self._values:
            n, places = len(y), math.prod(_places(self._layer, y))
            chosen = some_places(n, places, generator)
            taken, given = _take(self._layer, x, y, chosen.to(x.device))
            number = torch.arange(chosen.numel())
            number = samples + number // max(chosen.shape[1], 1) if self._by_sample else rows + number
            samples, rows = samples + n, rows + chosen.numel()
            given = given if self._kept is None else given[:, self._kept.to(given.device)]
            hold = (number % _ONE_IN == _ONE_IN - 1).to(given.device)
            yield as_double(taken).transpose(0, 1), as_double(given), hold.to(as_double(given).device)


def _basis(rows: _Rows) -> Tensor:
    """Orthonormal columns that span all rows of a layer with one group."""
    spanned: Tensor = torch.linalg.qr(torch.cat([x[0] for x, _, _ in rows]).mT)[0]
    return spanned


def _places(layer: Readable, y: Tensor) -> tuple[int, ...]:
    """The sizes of an output without samples and channels."""
    return tuple(y.shape[1:-1] if isinstance(layer, nn.Linear) else y.shape[2:])


def _with_samples(layer: Readable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Input and original output with samples in the first dimension."""
    if y.dim() == (1 if isinstance(layer, nn.Linear) else layer.weight.dim() - 1):
        x, y = x[None], y[None]
    if len(x) != len(y) or output_places(layer, x) != _places(layer, y):
        raise NotRefitted("its output had other places in the original network")
    return x, y


def _take(layer: Readable, x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at ``chosen`` places, ``(samples, places)``: ``(rows, groups, unknowns)`` and ``(rows, outputs)``."""
    samples = torch.arange(len(y), device=chosen.device)[:, None]
    given = y.reshape(len(y), -1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    return rows_at(layer, x, chosen), given[samples, chosen].flatten(0, 1)
