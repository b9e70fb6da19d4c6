"""Linear layers of integer weights that read real numbers, rounded to a scale of each call or not at all."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import Int8Linear, PostOp, to_uint8
from fxcompress.passes.quantization.vocabulary import PerTensor, dequantize_channels, dequantize_groups, dynamically

__all__ = ["DynamicInt8Linear", "WeightOnlyLinear", "has_int4_kernel"]

_ROWS = 32
"""Up to so many rows the weight-only kernels are faster than real weights made anew: 2 to 3 times as fast as a float32
layer with one row or eight, slower with 128 (AVX512, one thread, 768 to 3072 columns)."""
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_MIDDLE = 8  # the int4 kernel's integers are unsigned


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
        return self._kernel(integers, None, PerTensor(scale, zero_point, grid))

    def reference(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What :meth:`forward` stands for."""
        weight = dequantize_channels(self.weight, self.weight_scale, self.weight_zero_point, 0, Grid.of_weights(8))
        return self.post(F.linear(dynamically(x, self.given.grid), weight, self.bias))


class WeightOnlyLinear(nn.Module):
    """A linear layer that reads a quarter or an eighth of the bytes of its weight, and real numbers.

    Few rows are multiplied in bfloat16 by kernels that take integer weights; for many the real weight is made anew.

    Args:
        holder: what holds ``weight``, ``weight_scale``, ``weight_zero_point`` and ``bias`` in the reference graph.
        group: how many weights of a row have a scale; 0 if all have.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, holder: nn.Module, group: int) -> None:
        super().__init__()
        self.register_parameter("weight", holder.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", getattr(holder, "bias", None))
        self.register_buffer("weight_scale", holder.weight_scale)  # type: ignore[arg-type]
        self.register_buffer("weight_zero_point", holder.weight_zero_point)  # type: ignore[arg-type]
        self.group = group
        self._packed: tuple[Tensor, ...] | None = None
        self._packed_from: tuple[int, ...] | None = None
        self.train(holder.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packed_from": None}

    def forward(self, x: Tensor) -> Tensor:
        """The layer; real numbers to real numbers, ``(..., inputs)`` to ``(..., outputs)``."""
        rows = x.numel() // max(x.shape[-1], 1)
        if torch.compiler.is_compiling() or not 0 < rows <= _ROWS:
            return self.reference(x)
        low = x.reshape(rows, -1).bfloat16()
        weight, scale = self._for_kernel()
        if self.group:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(low, weight, self.group, scale)
        else:
            y = torch.ops.aten._weight_int8pack_mm(low, weight, scale)
        result: Tensor = y.to(x.dtype) if self.bias is None else y + self.bias
        return result.reshape(*x.shape[:-1], -1)

    def reference(self, x: Tensor) -> Tensor:
        """What :meth:`forward` stands for."""
        by = (self.weight, self.weight_scale, self.weight_zero_point)
        if self.group:
            weight = dequantize_groups(*by, self.group, Grid.of_weights(8))
        else:
            weight = dequantize_channels(*by, 0, Grid.of_weights(8))
        return F.linear(x, weight, self.bias)

    def _for_kernel(self) -> tuple[Tensor, ...]:
        tensors = (self.weight, self.weight_scale)
        origin = tuple(v for t in tensors for v in (t._version, t.data_ptr()))
        if self._packed is None or origin != self._packed_from:
            self._packed, self._packed_from = self._pack(), origin
        return self._packed

    def _pack(self) -> tuple[Tensor, ...]:
        scale = self.weight_scale.bfloat16()
        if not self.group:
            return self.weight.detach().contiguous(), scale
        integers = self.weight.detach().int() + _INT4_MIDDLE
        scale = scale.reshape(len(integers), -1).T
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        return packed, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, group={self.group or 'channel'}"


def has_int4_kernel(weight: Tensor, group: int) -> bool:
    """Whether a matrix of integers with a scale for each ``group`` of a row is something the int4 kernel takes."""
    fits = group in _INT4_GROUPS and weight.shape[0] % _ROWS == 0 and weight.shape[1] % group == 0
    return fits and bool((weight.abs() < _INT4_MIDDLE).all())
