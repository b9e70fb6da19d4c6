"""Modules that round as integers would and let gradients through: what quantisation-aware training trains with.

With s the scale and z the zero point, ``x -> s * (clamp(round(x / s) + z, low, high) - z)``. Backward, rounding counts
as the identity (Bengio et al. 2013, arXiv 1308.3432), so that gradients pass where nothing is clipped, and stop
elsewhere. By the same rule the gradient of s is ``round(x/s) - x/s`` inside and the bound outside: that of learned step
sizes (Esser et al. 2020, arXiv 1902.08153, equation 3), which is scaled by ``1 / sqrt(count * high)`` (section 2.2),
with the count of weights on a scale, or of elements of a sample.
Arithmetic is that of the ``quantized_decomposed`` operators, so that what is converted gives the same integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.vocabulary import PerTensor

__all__ = ["FakeQuantizer", "WeightFakeQuantizer"]


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _rounded(x: Tensor, scale: Tensor, zero_point: int, grid: Grid) -> Tensor:
    """The integers of ``x`` less the zero point, as real numbers that gradients pass."""
    steps = x * scale.double().reciprocal().to(x.dtype)
    steps = steps + (steps.round() - steps).detach()  # exact: both are within half of one another
    return steps.clamp(grid.low - zero_point, grid.high - zero_point)


def _whole_scale(largest: Tensor, grid: Grid) -> Tensor:
    """The scale with which magnitudes up to ``largest`` are not clipped; 1 where that is 0. Of its shape, float32."""
    largest = largest.float()
    return torch.where(largest > 0, largest / grid.high, 1.0).clamp_min(grid.least_scale)


class _Fake(nn.Module):
    """What both have: a grid, and a scale that may be learned."""

    scale: Tensor

    def __init__(self, grid: Grid, scale: Tensor, learned: bool) -> None:
        super().__init__()
        self.grid, self.learned = grid, learned
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def _scale_for(self, count: int) -> Tensor:
        """The scale, positive; its gradient is that of a step size for ``count`` elements."""
        scale = self.scale.clamp_min(self.grid.least_scale)
        if not self.learned:
            return scale
        result: Tensor = _ScaledGradient.apply(scale, 1 / math.sqrt(count * self.grid.high))  # type: ignore[no-untyped-call]
        return result


class FakeQuantizer(_Fake):
    """Rounds a value to one scale.

    Args:
        by: the scale, the zero point, which stays, and the grid.
        learned: whether the scale is a parameter.
        device: of the scale.
    """

    def __init__(self, by: PerTensor, learned: bool, device: torch.device | None = None) -> None:
        super().__init__(by.grid, torch.tensor(by.scale, dtype=torch.float32, device=device), learned)
        self.zero_point = by.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as integers stand for it."""
        scale = self._scale_for(max(x.numel() // max(len(x), 1), 1) if x.dim() else 1)
        return _rounded(x, scale, self.zero_point, self.grid) * scale.to(x.dtype)

    def by(self) -> PerTensor:
        """The scale as it is now."""
        return PerTensor(float(self.scale.detach().clamp_min(self.grid.least_scale)), self.zero_point, self.grid)

    def extra_repr(self) -> str:
        return f"{self.grid.low} to {self.grid.high}, zero_point={self.zero_point}, learned={self.learned}"


class WeightFakeQuantizer(_Fake):
    """Rounds a weight: one scale for all of it, for each index along a dimension, or for each group of a row.

    Where scales are not learned they follow the weight: they are in a fixed proportion to its largest magnitude.

    Args:
        grid: of the integers; its zero point is 0.
        scale: float32: one element, one for each index along ``axis``, or one for each group.
        axis: the dimension of output channels; ``None`` if a group has a scale.
        group: how many elements of a row have a scale; 0 if all.
        learned: whether scales are parameters; otherwise ``scale`` is relative to that with which nothing is clipped.
    """

    def __init__(self, grid: Grid, scale: Tensor, axis: int | None, group: int, learned: bool) -> None:
        super().__init__(grid, scale, learned)
        self.axis, self.group = axis, group

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` as integers stand for it."""
        parts, scale = self._parts(weight), self._scale(weight)
        return (_rounded(parts, scale, 0, self.grid) * scale.to(weight.dtype)).reshape(weight.shape)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What ``weight`` is now, int8, and the scales, float32 and of one dimension."""
        with torch.no_grad():
            scale = self._scale(weight)
            integers = _rounded(self._parts(weight), scale, 0, self.grid).to(torch.int8).reshape(weight.shape)
        return integers, scale.flatten()

    def _scale(self, weight: Tensor) -> Tensor:
        """Of a shape that broadcasts to :meth:`_parts`."""
        parts = self._parts(weight)
        scale = self._scale_for(max(parts.numel() // self.scale.numel(), 1))
        scale = scale.reshape([-1 if d == self._kept else 1 for d in range(parts.dim())])
        if self.learned:
            return scale
        others = [d for d in range(parts.dim()) if d != self._kept or self.scale.numel() == 1]
        return (scale * _whole_scale(parts.detach().abs().amax(others, keepdim=True), self.grid)).float()

    @property
    def _kept(self) -> int:
        """The dimension of :meth:`_parts` along which scales lie."""
        return 0 if self.axis is None else self.axis

    def _parts(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.group) if self.group else weight

    def extra_repr(self) -> str:
        what = f"group={self.group}" if self.group else f"axis={self.axis}"
        return f"{self.grid.low} to {self.grid.high}, {what}, learned={self.learned}"
