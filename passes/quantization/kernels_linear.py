"""Linear layers of integer weights that read real numbers, rounded to a scale of each call or not at all."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import Int8Linear, IntegerLayer, PostOp, to_uint8
from fxcompress.passes.quantization.vocabulary import PerTensor, dequantize_groups, dynamically
from fxcompress.storable import storable

__all__ = ["DynamicInt8Linear", "WeightOnlyLinear", "unfit"]

_ROWS = 32
"""Up to so many rows the weight-only kernels are faster than real weights made anew: 2 to 3 times as fast as a float32
layer with one row or eight, slower with 128 (AVX512, one thread, 768 to 3072 columns)."""
_INT8_COLUMNS = 16
"""The int8 kernel reads so many at once, beyond the end of a row too."""
_INT4_ROWS = 32
"""The int4 kernel takes outputs by as many."""
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_MIDDLE = 8  # the int4 kernel's integers are unsigned


@storable
class DynamicInt8Linear(Int8Linear):
    """A linear layer that rounds what it reads to a scale of its own in each call.

    Args:
        holder: as of :class:`Int8Layer`.
        grid: unsigned integers of 8 bits for the input.
        post: what follows.
    """

    def __init__(self, holder: nn.Module, grid: Grid, post: PostOp) -> None:
        super().__init__(holder, PerTensor(1.0, grid.low, grid), None, post)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The layer and what follows; real numbers to real numbers."""
        if torch.compiler.is_compiling() or not x.numel():
            return self.reference(x)
        grid = self.given.grid
        least, greatest = (float(v) for v in torch.aminmax(x))
        least, greatest = min(least, 0.0), max(greatest, 0.0)
        if not math.isfinite(greatest - least):
            return self.reference(x)
        scale = max((greatest - least) / (grid.high - grid.low), grid.least_scale)
        zero_point = min(max(grid.low - round(least / scale), grid.low), grid.high)
        integers = to_uint8(x, scale, zero_point, grid.low, grid.high)
        return self.kernel(integers, None, PerTensor(scale, zero_point, grid))

    def reference(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What :meth:`forward` stands for."""
        return self.post(F.linear(dynamically(x, self.given.grid), self.reals(), self.bias))


@storable
class WeightOnlyLinear(IntegerLayer):
    """A linear layer that reads a quarter or an eighth of the bytes of its weight, and real numbers.

    Few rows are multiplied in bfloat16 by kernels that take integer weights; for many the real weight is made anew.

    Args:
        holder: see :class:`IntegerLayer`.
        group: how many weights of a row have a scale; 0 if all have.
    """

    def __init__(self, holder: nn.Module, group: int) -> None:
        super().__init__(holder)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """The layer; real numbers to real numbers, ``(..., inputs)`` to ``(..., outputs)``."""
        rows = x.numel() // max(x.shape[-1], 1)
        if torch.compiler.is_compiling() or not 0 < rows <= _ROWS:
            return self.reference(x)
        low = x.reshape(rows, -1).bfloat16()
        weight, scale = self._packed_for(x)
        if self.group:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(low, weight, self.group, scale)
        else:
            y = torch.ops.aten._weight_int8pack_mm(low, weight, scale)
        result: Tensor = y.to(x.dtype) if self.bias is None else y + self.bias
        return result.reshape(*x.shape[:-1], -1)

    def reference(self, x: Tensor) -> Tensor:
        """What :meth:`forward` stands for."""
        return F.linear(x, self.reals(), self.bias)

    def reals(self) -> Tensor:
        """The weight in real numbers."""
        if not self.group:
            return super().reals()
        by = (self.weight, self.weight_scale, self.weight_zero_point)
        return dequantize_groups(*by, self.group, Grid.of_weights(8))

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight_scale.bfloat16()
        if not self.group:
            return self._dense(), scale
        integers = self._dense().int() + _INT4_MIDDLE
        scale = scale.reshape(len(integers), -1).T
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        return packed, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, group={self.group or 'channel'}"


def unfit(weight: Tensor, group: int) -> str | None:
    """Why no kernel of :class:`WeightOnlyLinear` takes a matrix of integers with a scale for each ``group`` of a row;
    ``None`` if one does."""
    if not group:
        odd = weight.shape[1] % _INT8_COLUMNS
        return f"its rows of {weight.shape[1]} are no multiple of {_INT8_COLUMNS}" if odd else None
    fits = group in _INT4_GROUPS and weight.shape[0] % _INT4_ROWS == 0 and weight.shape[1] % group == 0
    if not fits or not bool((weight.abs() < _INT4_MIDDLE).all()):
        return "its groups of weights fit no int4 kernel (4 bits, 32, 64, 128 or 256 in a group, rows by 32)"
    return None
