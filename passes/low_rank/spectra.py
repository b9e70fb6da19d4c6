"""Squared singular values of the slices of a layer, for every scheme and every number of slices.

They are the eigenvalues of the Gram matrix on the smaller side of a slice, for all slices at once, in float64, from
products that all numbers of slices share. With eps the machine epsilon, an eigenvalue is off by about eps times the
largest one, a singular value so by at most sqrt(eps) = 1.5e-8 times the largest: far less than the errors that are
compared, and many times as fast as a singular value decomposition. Factors, for the few candidates that are chosen,
are worked out in the same way.

With second moments of the inputs, ``C = E[x x']`` of what the columns of the folded weight read, the singular values
are those of ``W_i C_i^(1/2)``, whose squares are what a slice contributes to the mean square of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxcompress.layers import Layer
from fxcompress.passes.low_rank.folding import Folding, slices_of

__all__ = ["Spectrum", "factors", "spectra"]


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Squared singular values of the slices of one layer under one scheme.

    Attributes:
        scheme, slices: which.
        squares: of shape ``(groups * slices, min(rows, columns))``, descending.
    """

    scheme: int
    slices: int
    squares: Tensor

    @property
    def rank(self) -> int:
        """The full rank of a slice."""
        return self.squares.shape[1]


def spectra(
    layer: Layer, folding: Folding, scheme: int, numbers: Sequence[int], weighting: Tensor | None = None
) -> Iterator[Spectrum]:
    """The squared singular values for each number of slices.

    Args:
        layer: the layer.
        folding: of that layer.
        scheme: how it is folded.
        numbers: of slices.
        weighting: the second moment of what it reads, ``(groups, columns, columns)``.
    """
    grams = _Grams(layer, folding, scheme, numbers)
    for k in numbers:
        if weighting is None:
            gram = grams.at(k)
        elif grams.by_rows(k):
            w = folding.matrices(layer, scheme, k)
            gram = w @ slices_of(weighting, k) @ w.mT
        else:  # the eigenvalues of root' G root do not depend on which root it is
            root = _any_root(slices_of(weighting, k))
            gram = root.mT @ grams.at(k) @ root
        yield Spectrum(scheme, k, torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0.0))


class _Grams:
    """The Gram matrices of the slices on the smaller side, worked out once for several numbers of slices.

    On the side of the rows those of a slice are the sum of those of its parts, on the side of the columns those of a
    part are a block of its slice's. So products are made for the finest cut of the former and the coarsest of the
    latter; either holds no more elements than the weight.
    """

    def __init__(self, layer: Layer, folding: Folding, scheme: int, numbers: Sequence[int]) -> None:
        self._layer, self._folding, self._scheme, self._numbers = layer, folding, scheme, numbers
        self._known: dict[int, Tensor] = {}

    def by_rows(self, slices: int) -> bool:
        """Whether a slice has no more rows than columns."""
        rows, columns = self._folding.shape(self._scheme, slices)
        return rows <= columns

    def at(self, slices: int) -> Tensor:
        """Those of ``slices``, of shape ``(groups * slices, side, side)``."""
        rows = self.by_rows(slices)
        others = [k for k in self._numbers if self.by_rows(k) == rows and (k % slices if rows else slices % k) == 0]
        source = next((k for k in self._known if k in others), max(others) if rows else min(others))
        if source not in self._known:
            self._known[source] = self._product(source, rows)
        gram = self._known[source]
        if rows:
            return gram.reshape(-1, source // slices, *gram.shape[1:]).sum(1)
        return slices_of(gram, slices // source)

    def _product(self, slices: int, rows: bool) -> Tensor:
        w = self._folding.matrices(self._layer, self._scheme, slices)
        return w @ w.mT if rows else w.mT @ w


def _any_root(moment: Tensor) -> Tensor:
    """``R`` with ``R R' = moment``: by Cholesky where that is regular, as it nearly always is."""
    root, failed = torch.linalg.cholesky_ex(moment)
    return _root(moment) if bool(failed.any()) else root


def _gram(w: Tensor, moment: Tensor | None) -> tuple[Tensor, bool]:
    """The Gram matrix on the smaller side, and whether that is the side of the rows."""
    rows, columns = w.shape[1:]
    if moment is not None:
        if rows <= columns:
            return w @ moment @ w.mT, True
        root = _root(moment)
        return root @ (w.mT @ w) @ root, False
    return (w @ w.mT, True) if rows <= columns else (w.mT @ w, False)


def _root(moment: Tensor) -> Tensor:
    """The symmetric square root of each matrix, which is positive semidefinite."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()[:, None] @ vectors.mT
    return root


def factors(
    layer: Layer, folding: Folding, scheme: int, slices: int, rank: int, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``U`` and ``V`` whose product is nearest to each slice in the Frobenius norm (Eckart & Young 1936), or, with
    ``moment``, nearest in mean square of the output: then ``U V = P W`` with ``P`` the projection onto the leading left
    singular vectors of ``W C^(1/2)``, which needs no inverse of ``C``. Both carry the root of the singular values.

    Returns:
        ``(groups * slices, rows, rank)`` and ``(groups * slices, rank, columns)``, float64.
    """
    w = folding.matrices(layer, scheme, slices)
    gram, by_rows = _gram(w, moment)
    vectors = torch.linalg.eigh(gram)[1].flip(-1)[..., :rank]
    if by_rows:
        left, right = vectors, vectors.mT @ w
    elif moment is None:
        left, right = w @ vectors, vectors.mT
    else:
        left = torch.linalg.qr(w @ _root(moment) @ vectors)[0]
        right = left.mT @ w
    return _balanced(left, right)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with a column of ``left`` and the row of ``right`` beside it of the same norm."""
    a, b = left.norm(dim=1, keepdim=True), right.norm(dim=2, keepdim=True)
    tiny = torch.finfo(left.dtype).tiny
    scale = (b.mT.clamp_min(tiny) / a.clamp_min(tiny)).sqrt()
    alive = (a > 0) & (b.mT > 0)
    scale = torch.where(alive, scale, torch.ones_like(scale))
    return left * scale, right / scale.mT
