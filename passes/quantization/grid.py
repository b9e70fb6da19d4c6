"""Integers that stand for real numbers, and the scales between them.

A real number x is stood for by an integer q with ``x ~ scale * (q - zero_point)``,
``q = clamp(round(x / scale) + zero_point, low, high)`` (Jacob et al. 2018, arXiv 1712.05877, equation 1). Zero is
always one of the numbers that can be stood for, as padding needs it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.storable import storable

__all__ = ["Grid"]

_DTYPES = {8: (torch.uint8, torch.int8), 16: (torch.uint16, torch.int16)}


@storable
@dataclasses.dataclass(frozen=True)
class Grid:
    """The integers from ``low`` to ``high``, kept in tensors of ``dtype``."""

    low: int
    high: int
    dtype: torch.dtype

    @classmethod
    def of_activations(cls, bits: int, symmetric: bool) -> Grid:
        """For values: all unsigned integers of so many bits, or signed ones around a zero point of 0."""
        unsigned, signed = _DTYPES[bits]
        if symmetric:
            return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, signed)
        return cls(0, 2**bits - 1, unsigned)

    @classmethod
    def of_weights(cls, bits: int) -> Grid:
        """For weights: as many integers below 0 as above, in int8."""
        if not 2 <= bits <= 8:
            raise UsageError(f"weights have 2 to 8 bits, got {bits}")
        return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, torch.int8)

    @property
    def is_signed(self) -> bool:
        """Whether it is symmetric around 0, and so has no zero point but 0."""
        return self.low == -self.high

    @property
    def bits(self) -> int:
        """How many bits its integers need."""
        return (self.high - self.low).bit_length()

    @property
    def least_scale(self) -> float:
        """No scale is smaller, so that its inverse is a number."""
        return 1e-30

    def scales(self, least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point with which ``least`` to ``greatest``, and zero, can be stood for.

        Args:
            least: of any shape, float64; finite.
            greatest: of the same shape.

        Returns:
            Scales, float64 but exact in float32, and zero points, int64; of that shape. A range of zero has scale 1.
        """
        least, greatest = least.clamp(max=0.0), greatest.clamp(min=0.0)
        if self.is_signed:
            span, steps = torch.maximum(-least, greatest), self.high
        else:
            span, steps = greatest - least, self.high - self.low
        scale = torch.where(span > 0, (span / steps).clamp_min(self.least_scale), torch.ones_like(span))
        scale = scale.float().double()
        if self.is_signed:
            return scale, torch.zeros_like(scale, dtype=torch.int64)
        return scale, (self.low - torch.round(least / scale)).clamp(self.low, self.high).long()

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
        """The integers nearest to ``x``, as floating-point numbers."""
        return (torch.round(x / scale) + zero_point).clamp(self.low, self.high)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
        """``x`` as the integers nearest to it stand for it."""
        return (self.round(x, scale, zero_point) - zero_point) * scale
