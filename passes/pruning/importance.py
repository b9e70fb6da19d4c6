"""How much a channel matters: scores of the channels of a group, from all parameters that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxcompress.analysis.channels import Group, Member

__all__ = ["IMPORTANCES", "Importance", "Magnitude"]


class Importance:
    """Scores channels. Derive with ``@dataclasses.dataclass(frozen=True)``."""

    name: ClassVar[str]

    def scores(self, group: Group) -> Tensor:
        """One number for each channel of ``group``, larger for what matters more; float64, of shape ``(channels,)``."""
        raise NotImplementedError


def per_channel(member: Member, values: Tensor, channels: int) -> Tensor:
    """Sums ``values``, one for each index along the member's dimension, over the indices of each channel."""
    units = torch.from_numpy(member.units)
    inside = units >= 0
    total = torch.zeros(channels, dtype=torch.float64)
    return total.index_add_(0, units[inside], values.cpu().double()[inside])


def weights(group: Group) -> Iterator[Member]:
    """The members of ``group`` that are parameters."""
    return (m for m in group.members if isinstance(m.binding.tensor, nn.Parameter))


@dataclasses.dataclass(frozen=True)
class Magnitude(Importance):
    """The norm of the slices, averaged over everything that goes with a channel (Li et al. 2017, arXiv 1608.08710; over
    coupled slices as in DepGraph, Fang et al. 2023, arXiv 2301.12900).

    Args:
        p: 1 or 2; sums of |w|^p.
        reduce: over the slices of a channel.
        normalize: divide by the mean of the group, so that groups can be compared.
    """

    name: ClassVar[str] = "magnitude"
    p: int = 2
    reduce: Literal["mean", "max", "sum"] = "mean"
    normalize: bool = True

    def scores(self, group: Group) -> Tensor:
        """See :meth:`Importance.scores`."""
        found = []
        for member in weights(group):
            tensor = member.binding.tensor.detach()
            dims = [d for d in range(tensor.dim()) if d != member.binding.dim]
            power = tensor.double().abs().pow(self.p)
            found.append(per_channel(member, power.sum(dims) if dims else power, group.channels))
        stacked = torch.stack(found)
        total = {"mean": stacked.mean(0), "max": stacked.amax(0), "sum": stacked.sum(0)}[self.reduce]
        return total / total.mean().clamp_min(torch.finfo(torch.float64).tiny) if self.normalize else total


IMPORTANCES: Mapping[str, Callable[[], Importance]] = {
    "l1": lambda: Magnitude(p=1),
    "l2": lambda: Magnitude(p=2),
}
