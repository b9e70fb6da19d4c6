"""How far a layer is from itself when its slices have rank j: the error measures that ranks are chosen by.

With ``sigma_i,l`` the singular values of slice i of the folded weight W (of all groups of a grouped layer), sigma_1 the
largest singular value of W, and k the number of slices, at rank j:

==============  ======================================================================================================
``operator``    ``max_i sigma_i,j+1 / sigma_1``: what the code of the ALDS authors minimises. A lower bound of
                ``residual``: it flatters many slices.
``bound``       ``sqrt(k) max_i sigma_i,j+1 / sigma_1``: Theorem 1 of Liebenwein et al. 2021 (arXiv 2107.11442), an
                upper bound of ``residual``.
``residual``    ``||W - W'|| / sigma_1``, the spectral norm of what is missing, itself.
``frobenius``   ``sqrt(sum_i sum_l>j sigma_i,l^2) / ||W||_F``: the relative error of the output on white input.
``noise``       ``e / sqrt(1 - e^2)`` with e the ``frobenius`` error: what is missing relative to what is left.
``activation``  ``sqrt(sum_i sum_l>j s_i,l^2 / sum s^2)`` with s the singular values of ``W_i C_i^(1/2)``, C the
                moment of the layer's input on the calibration data: the relative error of the output there, as far as
                the slices' inputs are uncorrelated.
``log-energy``  ``sqrt(-log(1 - activation^2))``: for the objective of :class:`.baselines.Pca`.
==============  ======================================================================================================
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.layers import Layer
from fxcompress.passes.low_rank.folding import Folding
from fxcompress.passes.low_rank.spectra import Spectrum, factors

__all__ = [
    "ERRORS",
    "Activation",
    "Bound",
    "ErrorMeasure",
    "Frobenius",
    "LogEnergy",
    "Noise",
    "Operator",
    "Residual",
    "Scale",
]


@dataclasses.dataclass(frozen=True)
class ErrorMeasure:
    """From the spectrum of a layer to its error at each rank. Derive with ``@dataclasses.dataclass(frozen=True)``.

    Attributes:
        name: what options call it.
        needs_data: whether the spectra are to be those of weights times the root of the input's second moment.
        ranks: how many ranks are looked at for each number of slices; ``None`` for all of them.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    ranks: ClassVar[int | None] = None

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """The error at each of ``ranks``, from 1 to the full rank of a slice; of their shape, not increasing."""
        raise NotImplementedError(f"{type(self).__qualname__} must implement curve()")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What errors of a layer are relative to: ``largest`` is sigma_1^2, ``total`` the sum of all sigma^2."""

    largest: float
    total: float

    @classmethod
    def of(cls, whole: Spectrum) -> Scale:
        """From the spectrum of the layer in one slice."""
        tiny = np.finfo(np.float64).tiny  # a layer of zeros has no error
        return cls(max(float(whole.squares.max()), tiny), max(float(whole.squares.sum()), tiny))


def _next(found: Spectrum, ranks: np.ndarray) -> np.ndarray:
    """The largest squared singular value that rank j leaves out, over all slices."""
    largest = found.squares.amax(0)
    return np.asarray(np.append(largest.numpy(), 0.0)[ranks])


def _tail(found: Spectrum, ranks: np.ndarray) -> np.ndarray:
    """The sum of the squared singular values that rank j leaves out."""
    sums = found.squares.sum(0).flip(0).cumsum(0).flip(0)
    return np.asarray(np.append(sums.numpy(), 0.0)[ranks])


@dataclasses.dataclass(frozen=True)
class Operator(ErrorMeasure):
    """See the module: ``max_i sigma_i,j+1 / sigma_1``."""

    name: ClassVar[str] = "operator"

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        return np.sqrt(_next(found, ranks) / scale.largest)


@dataclasses.dataclass(frozen=True)
class Bound(ErrorMeasure):
    """See the module: ``sqrt(k)`` times ``operator``."""

    name: ClassVar[str] = "bound"

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        return np.sqrt(found.slices * _next(found, ranks) / scale.largest)


@dataclasses.dataclass(frozen=True)
class Residual(ErrorMeasure):
    """See the module: the true spectral norm of the residual.

    With one slice it is ``operator``. With more, ``R R' = sum_i U_i diag(sigma_i,l>j^2) U_i'`` is set up and its
    largest eigenvalue worked out for each rank looked at, so there are fewer of them.
    """

    name: ClassVar[str] = "residual"
    ranks: ClassVar[int | None] = 32

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        if found.slices == 1:
            return np.sqrt(_next(found, ranks) / scale.largest)
        left, right = factors(layer, folding, found.scheme, found.slices, found.rank)
        norms = [self._norm(left[:, :, j:], right[:, j:], folding.groups) for j in ranks.tolist()]
        return np.sqrt(np.minimum.accumulate(np.array(norms)) / scale.largest)

    @staticmethod
    def _norm(left: Tensor, right: Tensor, groups: int) -> float:
        """The largest eigenvalue of ``sum_i L_i (R_i R_i') L_i'`` over the slices of a group, the largest group's."""
        if not left.shape[2]:
            return 0.0
        weighted = left * right.norm(dim=2)[:, None]
        side = weighted.reshape(groups, -1, *weighted.shape[1:]).transpose(1, 2).flatten(2)
        gram = side @ side.mT if side.shape[1] <= side.shape[2] else side.mT @ side
        return max(float(torch.linalg.eigvalsh(gram)[..., -1].max()), 0.0)


@dataclasses.dataclass(frozen=True)
class Frobenius(ErrorMeasure):
    """See the module.

    Args:
        relative: divide by the norm of the layer's weight; if not, layers with large weights count more.
    """

    name: ClassVar[str] = "frobenius"
    relative: bool = True

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        return np.sqrt(_tail(found, ranks) / (scale.total if self.relative else 1.0))


@dataclasses.dataclass(frozen=True)
class Activation(Frobenius):
    """See the module: as ``frobenius``, weighted by what the layer reads on the calibration data.

    Only scheme 0 with one slice has the true error of the output there: what slices, or the taps that a decoder adds
    up, have in common is left out. So schemes compare less well under this error than under ``frobenius``.

    Args:
        shrinkage: from 0 to 1, how much of the moment is replaced by a multiple of the identity: few data say nothing
            about most directions. At 1 only the mean counts, which the bias takes up.
    """

    name: ClassVar[str] = "activation"
    needs_data: ClassVar[bool] = True
    shrinkage: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"shrinkage is a part, from 0 to 1, got {self.shrinkage}")


@dataclasses.dataclass(frozen=True)
class LogEnergy(Activation):
    """``sqrt(-log(1 - e^2))`` with e the ``activation`` error: the sum of the squares over layers is least where the
    product of the parts of variance that they keep is largest."""

    name: ClassVar[str] = "log-energy"

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        return np.asarray(np.sqrt(-np.log(_kept(super().curve(layer, folding, found, ranks, scale)))))


@dataclasses.dataclass(frozen=True)
class Noise(Frobenius):
    """``e / sqrt(1 - e^2)`` with e the ``frobenius`` error: what is missing relative to what is left.

    A relative error ends at 1, so that a sum of squares may give up a large layer altogether for little. This does not
    end, and no layer is given up.
    """

    name: ClassVar[str] = "noise"

    def curve(self, layer: Layer, folding: Folding, found: Spectrum, ranks: np.ndarray, scale: Scale) -> np.ndarray:
        """See :meth:`ErrorMeasure.curve`."""
        error = super().curve(layer, folding, found, ranks, scale)
        return np.asarray(error / np.sqrt(_kept(error)))


def _kept(error: np.ndarray) -> np.ndarray:
    """``1 - e^2``, not quite zero."""
    return np.asarray(1 - np.minimum(error**2, 1 - np.finfo(np.float64).eps))


_ALL = (Operator, Bound, Residual, Frobenius, Noise, Activation, LogEnergy)
ERRORS: dict[str, type[ErrorMeasure]] = {m.name: m for m in _ALL}
