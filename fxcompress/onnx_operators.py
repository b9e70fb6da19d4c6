"""Operators of the ``quantized_decomposed`` library in ONNX, for ``torch.onnx.export(custom_translation_table=...)``.

``onnxscript`` has translations of some: they let integers saturate at the limits of their dtype whatever the limits of
the grid are, take only scales that are constants, and know no groups of weights. These here are faithful, but for one
thing: ONNX divides by the scale where PyTorch multiplies by its inverse, so a value in the middle between two integers
may be rounded to the other one.

Importing this module needs ``onnxscript``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

import fxcompress.recording.internals  # noqa: F401  registers the operators

__all__ = ["translations"]

op: Any = opset21  # whose annotations know values, and not what stands for them while a graph is written
_OPS: Any = torch.ops.quantized_decomposed
_LIMITS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}
_MOVES = frozenset(("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))


def translations() -> dict[Any, Callable[..., Any]]:
    """From operators of PyTorch to functions that write them with operators of ONNX 21."""
    return {
        _OPS.choose_qparams.tensor: _choose_qparams,
        _OPS.quantize_per_tensor.default: _quantize,
        _OPS.quantize_per_tensor.tensor: _quantize_by,
        _OPS.dequantize_per_tensor.default: _dequantize,
        _OPS.dequantize_per_tensor.tensor: _dequantize_by,
        _OPS.dequantize_per_channel.default: _dequantize_channels,
        _OPS.dequantize_per_channel_group.default: _dequantize_groups,
    }


def _constant(value: Any, dtype: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType(dtype)))


def _float(x: Any) -> Any:
    return op.Cast(x, to=ir.DataType.FLOAT)


def _as(reals: Any, out_dtype: int | None) -> Any:
    return reals if out_dtype in (None, -1, ir.DataType.FLOAT) else op.Cast(reals, to=out_dtype)


def _single(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _narrower(low: int, high: int, dtype: int) -> bool:
    """Whether integers from ``low`` to ``high`` are not all of ``dtype``, at whose limits QuantizeLinear saturates."""
    return (low, high) != _LIMITS[ir.DataType(dtype)]


# ------------------------------------------------------------------------------------------------- fixed scales
def _quantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    integers = _moved_integers(x)
    x = _float(x)
    # What was on this grid before, and only moved since, is within its limits.
    if _narrower(quant_min, quant_max, dtype) and integers != (_single(scale), zero_point):
        ends = ((end - zero_point) * scale for end in (quant_min, quant_max))
        x = op.Clip(x, *(_constant(end, ir.DataType.FLOAT) for end in ends))
    return op.QuantizeLinear(x, _constant(scale, ir.DataType.FLOAT), _constant(zero_point, dtype))


def _dequantize(
    x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int, out_dtype: int | None = None
) -> Any:
    by = _constant(scale, ir.DataType.FLOAT), _constant(zero_point, dtype)
    return _as(op.DequantizeLinear(x, *by), out_dtype)


def _moved_integers(x: Any) -> tuple[float, int] | None:
    """Scale and zero point of the integers that ``x`` is made of, if it is some of them in another place."""
    node = x.producer()
    while node is not None and node.op_type in _MOVES:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    scale, zero_point = (ir.convenience.get_const_tensor(part) for part in node.inputs[1:3])
    if scale is None or zero_point is None or scale.size != 1:
        return None
    return scale.numpy().item(), zero_point.numpy().item()


# ------------------------------------------------------------------------------------------------- scales of each run
def _choose_qparams(x: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    x, zero = _float(x), _constant(0.0, ir.DataType.FLOAT)
    least = op.Min(op.ReduceMin(x, keepdims=0), zero)
    greatest = op.Max(op.ReduceMax(x, keepdims=0), zero)
    steps = _constant(float(quant_max - quant_min), ir.DataType.FLOAT)
    scale = op.Max(op.Div(op.Sub(greatest, least), steps), _constant(eps, ir.DataType.FLOAT))
    low, high = (_constant(float(end), ir.DataType.FLOAT) for end in (quant_min, quant_max))
    zero_point = op.Clip(op.Sub(low, op.Round(op.Div(least, scale))), low, high)
    one = _constant([1], ir.DataType.INT64)
    return (
        op.Reshape(op.Cast(scale, to=ir.DataType.DOUBLE), one),
        op.Reshape(op.Cast(zero_point, to=ir.DataType.INT64), one),
    )


def _scalars(scale: Any, zero_point: Any, dtype: int) -> tuple[Any, Any]:
    none = op.Constant(value=ir.tensor([], dtype=ir.DataType.INT64))
    return op.Reshape(_float(scale), none), op.Reshape(op.Cast(zero_point, to=dtype), none)


def _quantize_by(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    by, x = _scalars(scale, zero_point, dtype), _float(x)
    if _narrower(quant_min, quant_max, dtype):
        middle = _float(by[1])
        ends = (
            op.Mul(op.Sub(_constant(float(end), ir.DataType.FLOAT), middle), by[0]) for end in (quant_min, quant_max)
        )
        x = op.Clip(x, *ends)
    return op.QuantizeLinear(x, *by)


def _dequantize_by(
    x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int, out_dtype: int | None = None
) -> Any:
    return _as(op.DequantizeLinear(x, *_scalars(scale, zero_point, dtype)), out_dtype)


# ------------------------------------------------------------------------------------------------- weights
def _dequantize_channels(
    x: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: int,
    out_dtype: int | None = None,
) -> Any:  # fmt: skip
    by = _float(scales), op.Cast(zero_points, to=dtype)
    return _as(op.DequantizeLinear(x, *by, axis=axis), out_dtype)


def _dequantize_groups(
    x: Any, scales: Any, zero_points: Any, quant_min: int, quant_max: int, dtype: int, group_size: int = 128,
    output_dtype: int = ir.DataType.FLOAT,
) -> Any:  # fmt: skip
    shape = _constant([x.shape[0], -1], ir.DataType.INT64)
    by = (op.Reshape(part, shape) for part in (_float(scales), op.Cast(zero_points, to=dtype)))
    return _as(op.DequantizeLinear(x, *by, axis=1, block_size=min(group_size, x.shape[1])), output_dtype)
