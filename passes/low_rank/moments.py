"""First and second moments of what the encoders of a layer would read, streamed over calibration data."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from fxcompress.analysis.patches import READABLE, output_places, rows_at
from fxcompress.passes.low_rank.folding import Folding, Layer

__all__ = ["Moments", "MomentsObserver", "observable"]

_PLACES = 64
"""Of each sample as many places are looked at, drawn from a fixed seed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of the rows that an encoder of ``scheme`` reads.

    Attributes:
        count: how many rows.
        mean: ``(groups, inputs * taps of the encoder)``.
        second: ``E[x x']``, ``(groups, inputs * taps, inputs * taps)``; float64.
    """

    count: int
    mean: Tensor
    second: Tensor

    def covariance(self) -> Tensor:
        """``E[(x - mean) (x - mean)']``."""
        return self.second - self.mean[:, :, None] * self.mean[:, None]

    @classmethod
    def merged(cls, parts: list[Moments]) -> Moments:
        """Of the rows of all ``parts`` (the calls of a shared layer)."""
        count = sum(p.count for p in parts)
        shares = [p.count / max(count, 1) for p in parts]
        mean = torch.stack([s * p.mean for s, p in zip(shares, parts, strict=True)]).sum(0)
        second = torch.stack([s * p.second for s, p in zip(shares, parts, strict=True)]).sum(0)
        return cls(count, mean, second)


def observable(layer: Layer, folding: Folding, scheme: int) -> bool:
    """Whether what the encoder reads can be written as rows: not under the taps of a transposed convolution."""
    return isinstance(layer, READABLE) or folding.taps(scheme)[0] == 1


def slices_of(second: Tensor, slices: int) -> Tensor:
    """The blocks of ``(groups, size, size)`` along the diagonal, ``(groups * slices, size / slices, size / slices)``."""
    groups, size, _ = second.shape
    blocks = second.reshape(groups, slices, size // slices, slices, size // slices)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


class MomentsObserver:
    """An observer of a layer's input.

    Args:
        layer: the layer.
        scheme: how it is folded; :func:`observable` holds.
    """

    def __init__(self, layer: Layer, scheme: int) -> None:
        folding = Folding.of(layer)
        nothing = torch.zeros(folding.groups, folding.outputs * folding.taps(scheme)[1], 1, dtype=torch.float64)
        empty = torch.zeros(folding.groups, 1, folding.inputs * folding.taps(scheme)[0], dtype=torch.float64)
        encoder = folding.pair(layer, scheme, nothing, empty, None)[0]
        assert isinstance(encoder, READABLE), "observable() holds, and there is one slice"
        self._encoder = encoder
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0
        size = empty.shape[2]
        self._sum = torch.zeros(folding.groups, size, dtype=torch.float64)
        self._second = torch.zeros(folding.groups, size, size, dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """Take in one input of the layer."""
        unbatched = 1 if isinstance(self._encoder, nn.Linear) else self._encoder.weight.dim() - 1
        value = value[None] if value.dim() == unbatched else value
        places = math.prod(output_places(self._encoder, value))
        if places > _PLACES:
            chosen = torch.randint(places, (len(value), _PLACES), generator=self._generator)
        else:
            chosen = torch.arange(places).expand(len(value), places)
        rows = rows_at(self._encoder, value, chosen.to(value.device)).cpu().double().transpose(0, 1)
        self._count += rows.shape[1]
        self._sum += rows.sum(1)
        self._second += rows.mT @ rows

    def result(self) -> Moments:
        """The moments so far; zeros if nothing was seen."""
        count = max(self._count, 1)
        return Moments(self._count, self._sum / count, self._second / count)
