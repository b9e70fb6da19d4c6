"""What low-rank methods before ALDS do, in the same frame: each is a choice of error measure and of solver."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from fxcompress.pass_base import Need
from fxcompress.passes.low_rank.alds import Alds
from fxcompress.passes.low_rank.errors import ErrorMeasure, Frobenius, LogEnergy

__all__ = ["LearnedRank", "Pca", "Svd", "SvdEnergy"]

_LOG_ENERGY, _ABSOLUTE = LogEnergy(shrinkage=0.0), Frobenius(relative=False)


@dataclasses.dataclass(frozen=True)
class Svd(Alds):
    """A truncated singular value decomposition of each layer, the same ratio for all of them (Denton et al. 2014,
    arXiv 1404.0736)."""

    name: ClassVar[str] = "svd"
    solver: Literal["minimax", "sum", "constant"] = "constant"
    slices: int | None = 1


@dataclasses.dataclass(frozen=True)
class SvdEnergy(Alds):
    """As :class:`Svd`, with ranks that leave every layer the same part of its energy, the sum of its squared singular
    values (Alvarez & Salzmann 2017, arXiv 1711.02638, without the training): the largest relative error least."""

    name: ClassVar[str] = "svd-energy"
    solver: Literal["minimax", "sum", "constant"] = "minimax"
    slices: int | None = 1


@dataclasses.dataclass(frozen=True)
class Pca(Alds):
    """The principal components of each layer's outputs on calibration data, with ranks that maximise the product of
    the parts of their variance that layers keep (Zhang et al. 2016, arXiv 1505.06798, its linear, symmetric form).

    The product is at its largest where the sum of ``-log(1 - error^2)`` is least, which is solved exactly and not
    greedily.
    """

    name: ClassVar[str] = "pca"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS, Need.CALIBRATION})
    error: str | ErrorMeasure = _LOG_ENERGY
    slices: int | None = 1


@dataclasses.dataclass(frozen=True)
class LearnedRank(Alds):
    """Ranks with the least sum of the squared distances of all weights to what is left of them: the selection step of
    Idelbayev & Carreira-Perpinan 2020 (CVPR, "Low-rank compression of neural nets: learning the rank of each layer").
    Their alternation with training is not here."""

    name: ClassVar[str] = "learned-rank"
    error: str | ErrorMeasure = _ABSOLUTE
    slices: int | None = 1
