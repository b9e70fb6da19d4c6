"""First and second moments of what a layer reads for each place of its output, streamed over data."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from fxcompress.analysis.patches import Readable, output_places, rows_at, some_places

__all__ = ["Moments", "MomentsObserver", "as_double", "second_moment_fits"]

_LARGEST_MOMENT = 2**27
"""A second moment has at most as many elements: 1 GiB, 11,585 columns."""
_CONSTANT = 1e-12
"""A variance of no more than this part of the mean square is rounding."""


def second_moment_fits(groups: int, columns: int) -> bool:
    """Whether the second moment of rows of so many columns, in so many groups, is small enough to keep."""
    return groups * columns**2 <= _LARGEST_MOMENT


def as_double(values: Tensor) -> Tensor:
    """``values`` in float64, where they are if that has float64."""
    return (values.detach().cpu() if values.device.type == "mps" else values.detach()).double()


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of rows, of one or several groups.

    Attributes:
        count: how many rows.
        mean: ``(groups, columns)``; float64.
        second: ``E[x x']``, ``(groups, columns, columns)``; float64. Empty where only the mean was asked for.
    """

    count: int
    mean: Tensor
    second: Tensor

    def is_finite(self) -> bool:
        """Whether all of it is."""
        return bool(torch.isfinite(self.mean).all()) and bool(torch.isfinite(self.second).all())

    def spans(self) -> bool:
        """Whether there are more rows than columns, so that the covariance may have full rank."""
        return self.count > self.mean.shape[1]

    def weighting(self, *, centred: bool, shrinkage: float) -> Tensor | None:
        """What counts of a change of a weight that reads these rows.

        Args:
            centred: the covariance instead of the second moment, where a bias takes up the mean.
            shrinkage: how much of it is replaced by a multiple of the identity of the same trace, which stands for what
                the data do not show and makes it regular.

        Returns:
            Of the shape of :attr:`second`; ``None`` if the data do not vary, so that nothing can be weighed by them.
        """
        found = self.second.clone()
        if centred:
            found -= self.mean[:, :, None] * self.mean[:, None]
        varies = found.diagonal(dim1=1, dim2=2).mean(-1)
        if bool((varies <= _CONSTANT * self.second.diagonal(dim1=1, dim2=2).mean(-1)).any()):
            return None
        found *= 1 - shrinkage
        found.diagonal(dim1=1, dim2=2).add_(shrinkage * varies[:, None])
        return found

    @classmethod
    def merged(cls, parts: list[Moments]) -> Moments | None:
        """Of the rows of all ``parts`` (the calls of a shared layer); ``None`` if there are none."""
        count = sum(p.count for p in parts)
        if not count:
            return None
        if len(parts) == 1:
            return parts[0]
        shares = [p.count / count for p in parts]
        mean = torch.stack([s * p.mean for s, p in zip(shares, parts, strict=True)]).sum(0)
        second = torch.stack([s * p.second for s, p in zip(shares, parts, strict=True)]).sum(0)
        return cls(count, mean, second)


class MomentsObserver:
    """An observer of the input of ``layer``.

    Args:
        layer: what reads rows of it.
        second: whether to keep the second moment too.
    """

    def __init__(self, layer: Readable, *, second: bool = True) -> None:
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        size = math.prod(layer.weight.shape[1:])
        self._layer = layer
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0
        self._sum = torch.zeros(groups, size, dtype=torch.float64)
        kept = size if second else 0
        self._second = torch.zeros(groups, kept, kept, dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """Take in one input of the layer."""
        if not value.numel():
            return
        unbatched = 1 if isinstance(self._layer, nn.Linear) else self._layer.weight.dim() - 1
        value = value[None] if value.dim() == unbatched else value
        places = math.prod(output_places(self._layer, value))
        chosen = some_places(len(value), places, self._generator)
        rows = rows_at(self._layer, value, chosen.to(value.device)).cpu().double().transpose(0, 1)
        self._count += rows.shape[1]
        self._sum += rows.sum(1)
        if self._second.numel():
            self._second.baddbmm_(rows.mT, rows)

    def merge(self, other: MomentsObserver) -> None:
        """Take in what ``other`` saw."""
        self._count += other._count
        self._sum += other._sum
        self._second += other._second

    def result(self) -> Moments:
        """The moments so far; zeros if nothing was seen."""
        count = max(self._count, 1)
        return Moments(self._count, self._sum / count, self._second / count)
