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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.vocabulary import PerTensor
from fxcompress.storable import storable

__all__ = ["FakeQuantizer", "WeightFakeQuantizer"]


class _Rounding(torch.autograd.Function):
    """What ``x`` is as integers from ``low`` to ``high``, less the zero point, stand for it.

    Nothing that is read is kept for the way back: it may be written to. ``factor`` is on the gradient of the scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float) -> Tensor:
        steps = _steps(x, scale)
        nearest = steps.round()
        rounded = nearest.clamp(low, high)
        inside = rounded == nearest
        slope = rounded - torch.where(inside, steps, 0.0) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope)
        ctx.factor, ctx.shape = factor, scale.shape
        return (rounded * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope = ctx.saved_tensors
        of_scale = None if slope is None else (gradient * slope).sum_to_size(ctx.shape) * ctx.factor
        return gradient * inside, of_scale, None, None, None


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """How many scales ``x`` is, float32; as the operators count them."""
    return x.float() * scale.double().reciprocal().float()


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

    def _positive(self) -> Tensor:
        """The scale: one that training took across zero is as good as its magnitude."""
        return self.scale.abs().clamp_min(self.grid.least_scale)

    def _rounded(self, x: Tensor, scale: Tensor, zero_point: int, count: int) -> Tensor:
        """``x`` as integers stand for it, ``count`` elements of a sample to a scale."""
        ends = self.grid.low - zero_point, self.grid.high - zero_point
        rounded: Tensor = _Rounding.apply(x, scale, *ends, 1 / math.sqrt(count * self.grid.high))  # type: ignore[no-untyped-call]
        return rounded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move scales as other tensors; they stay float32 where others are cast."""

        def moved(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            return cast if cast.dtype == tensor.dtype else tensor.to(cast.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


@storable
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
        count = max(math.prod(x.shape[1:]), 1)
        return self._rounded(x, self._positive(), self.zero_point, count)

    def by(self) -> PerTensor:
        """The scale as it is now."""
        return PerTensor(float(self._positive().detach()), self.zero_point, self.grid)

    def extra_repr(self) -> str:
        return f"{self.grid.low} to {self.grid.high}, zero_point={self.zero_point}, learned={self.learned}"


@storable
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
        parts = self._parts(weight)
        count = max(parts.numel() // self.scale.numel(), 1)
        return self._rounded(parts, self._scale(parts), 0, count).reshape(weight.shape)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What ``weight`` is now, int8, and the scales, float32 and of one dimension."""
        with torch.no_grad():
            parts = self._parts(weight)
            scale = self._scale(parts)
            integers = _steps(parts, scale).round().clamp(self.grid.low, self.grid.high)
        return integers.to(torch.int8).reshape(weight.shape), scale.flatten()

    def _scale(self, parts: Tensor) -> Tensor:
        """Of a shape that broadcasts to ``parts``."""
        scale = self._positive().reshape([-1 if d == self._kept else 1 for d in range(parts.dim())])
        if self.learned:
            return scale
        others = [d for d in range(parts.dim()) if d != self._kept or self.scale.numel() == 1]
        return scale * _whole_scale(parts.detach().abs().amax(others, keepdim=True), self.grid)

    @property
    def _kept(self) -> int:
        """The dimension of :meth:`_parts` along which scales lie."""
        return 0 if self.axis is None else self.axis

    def _parts(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.group) if self.group else weight

    def extra_repr(self) -> str:
        what = f"group={self.group}" if self.group else f"axis={self.axis}"
        return f"{self.grid.low} to {self.grid.high}, {what}, learned={self.learned}"
