"""First and second moments of what the encoders of a layer would read, streamed over calibration data."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from fxcompress.analysis.patches import READABLE, output_places, rows_at
from fxcompress.passes.low_rank.folding import Folding, Layer

__all__ = ["Moments", "MomentsObserver", "takes_up_mean", "unobservable"]

_CONSTANT = 1e-12
"""A variance of no more than this part of the mean square is rounding."""
_LARGEST = 2**27
"""A second moment has at most as many elements: 1 GiB, 11,585 columns."""
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

    def is_finite(self) -> bool:
        """Whether all of it is."""
        return bool(torch.isfinite(self.second).all())

    def weighting(self, layer: Layer, shrinkage: float) -> Tensor | None:
        """What the weight of ``layer`` is multiplied by: the covariance if it has a bias, which takes up the mean,
        else the second moment; mixed with a multiple of the identity of the same trace, which stands for what the data
        do not show and makes it regular.

        Returns:
            Of the shape of :attr:`second`; ``None`` if the data do not vary, so that nothing can be weighed by them.
        """
        found = self.second.clone()
        if takes_up_mean(layer):
            found -= self.mean[:, :, None] * self.mean[:, None]
        varies = found.diagonal(dim1=1, dim2=2).mean(-1)
        if bool((varies <= _CONSTANT * self.second.diagonal(dim1=1, dim2=2).mean(-1)).any()):
            return None
        found *= 1 - shrinkage
        found.diagonal(dim1=1, dim2=2).add_(shrinkage * varies[:, None])
        return found

    def spans(self) -> bool:
        """Whether there are more rows than inputs, so that the covariance may have full rank."""
        return self.count > self.mean.shape[1]

    def said(self, scheme: int) -> str:
        """What to say where they do not span."""
        return (
            f"scheme {scheme}: {self.count} rows of calibration data for {self.mean.shape[1]} inputs, so their "
            "covariance is singular; see `shrinkage`"
        )

    def of_mean(self, folding: Folding, missing: Tensor) -> Tensor:
        """What the missing part of a weight gives on the mean input; borders aside.

        Args:
            folding: of the layer.
            missing: the weight less the pair's, ``(groups * slices, rows, columns)``.

        Returns:
            For each output, ``(all outputs,)``.
        """
        mean = self.mean.reshape(len(missing), -1, 1)
        given = (missing @ mean).reshape(folding.groups, -1, folding.outputs, missing.shape[1] // folding.outputs)
        return given.sum((1, 3)).flatten()

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


def takes_up_mean(layer: Layer) -> bool:
    """Whether a change of the bias of ``layer`` makes up for what a pair misses of the mean input: in a transposed
    convolution not every output gets something from every tap."""
    return layer.bias is not None and not getattr(layer, "transposed", False)


def unobservable(layer: Layer, folding: Folding, scheme: int) -> str | None:
    """Why no moments are taken of what the encoder reads: under the taps of a transposed convolution it cannot be
    written as rows, and where there are very many columns their moment would not fit (and its roots take minutes)."""
    if not isinstance(layer, READABLE) and folding.taps(scheme)[0] > 1:
        return "a transposed kernel"
    columns = folding.shape(scheme, 1)[1]
    if folding.groups * columns**2 > _LARGEST:
        return f"a second moment of {columns} inputs is too large"
    return None


class MomentsObserver:
    """An observer of a layer's input.

    Args:
        layer: the layer.
        scheme: how it is folded; :func:`unobservable` is ``None``.
    """

    def __init__(self, layer: Layer, scheme: int) -> None:
        folding = Folding.of(layer)
        nothing = torch.zeros(folding.groups, folding.outputs * folding.taps(scheme)[1], 1, dtype=torch.float64)
        empty = torch.zeros(folding.groups, 1, folding.inputs * folding.taps(scheme)[0], dtype=torch.float64)
        encoder = folding.pair(layer, scheme, nothing, empty, None)[0]
        assert isinstance(encoder, READABLE), "unobservable() is None, and there is one slice"
        self._encoder = encoder
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0
        size = empty.shape[2]
        self._sum = torch.zeros(folding.groups, size, dtype=torch.float64)
        self._second = torch.zeros(folding.groups, size, size, dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """Take in one input of the layer."""
        if not value.numel():
            return
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
        self._second.baddbmm_(rows.mT, rows)

    def result(self) -> Moments:
        """The moments so far; zeros if nothing was seen."""
        count = max(self._count, 1)
        return Moments(self._count, self._sum / count, self._second / count)
