"""How much a channel matters: the importances by name, and those that look at weights alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.analysis.channels import ChannelGroups, Group, Member
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import PassContext
from fxcompress.passes.pruning.importance_data import Activation
from fxcompress.passes.pruning.importance_gradient import Hessian, Taylor
from fxcompress.passes.pruning.importance_sensitivity import ProvableSensitivity
from fxcompress.passes.pruning.scoring import (
    Coupled,
    Importance,
    Scorer,
    per_channel,
    per_index,
    producers,
    weights,
)

__all__ = [
    "IMPORTANCES",
    "Activation",
    "BatchNormScale",
    "FilterThreshold",
    "GeometricMedian",
    "Hessian",
    "Importance",
    "LayerAdaptiveMagnitude",
    "Magnitude",
    "ProvableSensitivity",
    "Random",
    "Taylor",
]


def _powers(member: Member, p: int, channels: int) -> Tensor:
    """Sums of ``|w|^p`` over the slice of each channel."""
    of = Tensor.abs if p == 1 else Tensor.square
    return per_channel(member, per_index(member.binding.tensor, member.binding.dim, of), channels)


def _check_p(p: int) -> None:
    if p not in (1, 2):
        raise UsageError(f"p is 1 or 2, got {p!r}")


@dataclasses.dataclass(frozen=True)
class Magnitude(Coupled):
    """The sum of ``|w|^p`` over each slice, combined over everything that goes with a channel (Li et al. 2017, arXiv
    1608.08710; over coupled slices as in DepGraph, Fang et al. 2023, arXiv 2301.12900).

    Args:
        p: 1 or 2.
        reduce, normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "magnitude"
    p: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_p(self.p)

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        return self.combine([_powers(m, self.p, group.channels) for m in weights(group)])


@dataclasses.dataclass(frozen=True)
class FilterThreshold(Importance):
    """The norm of the filters that make a channel, as it is: what "FT" is in Liebenwein et al. 2021 (ALDS, arXiv
    2107.11442), after Li et al. 2017 (arXiv 1608.08710).

    Where several layers make the channel together (residual connections), it is that of all their filters side by side.

    Args:
        p: 1 or 2; the norm.
    """

    name: ClassVar[str] = "filter-threshold"
    p: int = 2

    def __post_init__(self) -> None:
        _check_p(self.p)

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        powers = torch.stack([_powers(m, self.p, group.channels) for m in producers(group)])
        return powers.sum(0).pow(1 / self.p)


@dataclasses.dataclass(frozen=True)
class LayerAdaptiveMagnitude(Coupled):
    """LAMP: the share of a channel in the squared norm of all that are not smaller (Lee et al. 2021, arXiv 2010.07611).

    With the group's squared norms m (as :class:`Magnitude` with p=2) in ascending order, the score of u is
    ``m_u / sum of m_v over v >= u``: 1 for the largest. The paper scores weights of a layer, this the channels of a
    group. The order within a group is that of the norms; what changes is how groups compare, so it is of use with
    ``scope="global"``. Groups are comparable by construction: ``normalize`` does nothing here and is off.

    Args:
        reduce: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "lamp"
    normalize: bool = dataclasses.field(default=False, kw_only=True)

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        found = self.combine([_powers(m, 2, group.channels) for m in weights(group)])
        ascending, order = torch.sort(found, stable=True)
        rest = ascending.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(found.dtype).tiny)
        return torch.empty_like(found).scatter_(0, order, ascending / rest)


@dataclasses.dataclass(frozen=True)
class GeometricMedian(Coupled):
    """FPGM: the sum of the distances of a channel's filter to all others (He et al. 2019, arXiv 1811.00250). Filters
    near the geometric median are replaceable by the others.

    Each layer that makes the channels gives its own sum. What several filters of a layer make together (a head) counts
    as one filter, theirs side by side.

    Args:
        reduce: over the layers that make the channels.
        normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "fpgm"

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        filters = [_filters(m, group.channels) for m in producers(group)]
        return self.combine([torch.cdist(f, f).sum(1) for f in filters])


def _filters(member: Member, channels: int) -> Tensor:
    """What makes each channel, of shape ``(channels, weights)``; float64, zeros where a channel has fewer filters."""
    inside = np.flatnonzero(member.units >= 0)
    order = inside[np.argsort(member.units[inside], kind="stable")]
    units = member.units[order]
    counts = np.bincount(units, minlength=channels)
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[units]
    tensor = member.binding.tensor.detach().cpu().double().movedim(member.binding.dim, 0)
    out = torch.zeros(channels, int(counts.max()), tensor[0].numel(), dtype=torch.float64)
    out[torch.from_numpy(units), torch.from_numpy(place)] = tensor.reshape(len(tensor), -1)[torch.from_numpy(order)]
    return out.flatten(1)


@dataclasses.dataclass(frozen=True)
class BatchNormScale(Coupled):
    """``|gamma|`` of the batch norms that a channel goes through (Network Slimming, Liu et al. 2017, arXiv 1708.06519).

    Where a channel has several places in one batch norm (after a flatten) it is their mean. Not normalised by default:
    the paper ranks all channels of the network by ``|gamma|``. A group without a batch norm (or with none that has
    scales) has nothing to be ranked by and is refused, unless ``otherwise`` says how.

    Args:
        reduce: over the batch norms.
        normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
        otherwise: what scores groups without a batch norm; it needs no data.
    """

    name: ClassVar[str] = "batch-norm-scale"
    normalize: bool = dataclasses.field(default=False, kw_only=True)
    otherwise: Importance | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.otherwise is not None and self.otherwise.needs_data:
            raise UsageError(f"otherwise is to look at weights alone; {self.otherwise.name!r} needs data")

    def prepare(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """See :meth:`Importance.prepare`. The scorer raises PreconditionError for a group without a batch norm."""
        norms = [m for m in context.gm.modules() if isinstance(m, _BatchNorm)]
        scales = {id(m.weight) for m in norms if m.affine}
        otherwise = None if self.otherwise is None else self.otherwise.scorer(context, groups)

        def score(group: Group) -> Tensor:
            members = [m for m in group.members if id(m.binding.tensor) in scales]
            if members:
                return self.combine([_mean_scale(m, group.channels) for m in members])
            if otherwise is not None:
                return otherwise(group)
            raise PreconditionError(
                f"importance {self.name!r} goes by batch norms, and group {group.name!r} (made by "
                f"{', '.join(group.producers)}) goes through none with scales. Exclude these layers, say by what they "
                "are ranked instead (BatchNormScale(otherwise=...)), or take another importance"
            )

        return score


def _mean_scale(member: Member, channels: int) -> Tensor:
    counts = np.bincount(member.units[member.units >= 0], minlength=channels)
    return _powers(member, 1, channels) / torch.from_numpy(counts)


@dataclasses.dataclass(frozen=True)
class Random(Importance):
    """Uniform random numbers in [0, 1), the same for the same group and seed whatever else is pruned.

    Args:
        seed: any integer.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        # Two groups may begin with the same layer, so its name alone would not tell them apart.
        labels = [m.binding.label for m in group.members]
        generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, labels)).encode()))
        return torch.rand(group.channels, generator=generator, dtype=torch.float64)


IMPORTANCES: Mapping[str, Callable[[], Importance]] = {
    "l1": lambda: Magnitude(p=1),
    "l2": lambda: Magnitude(p=2),
    "filter-threshold": FilterThreshold,
    "batch-norm-scale": BatchNormScale,
    "lamp": LayerAdaptiveMagnitude,
    "fpgm": GeometricMedian,
    "random": Random,
    "taylor": Taylor,
    "hessian": Hessian,
    "activation": Activation,
    "pfp": ProvableSensitivity,
}
