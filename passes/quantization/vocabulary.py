"""Quantize and dequantize nodes: the operators of the ``quantized_decomposed`` library, in one place.

They are what PyTorch's own exporters and compilers (Inductor, ExecuTorch) understand; each is plain arithmetic and runs
anywhere. They are registered by ``fxcompress/recording/internals.py``, where all that leans on one torch version is.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.passes.quantization.grid import Grid
from fxcompress.storable import storable

__all__ = [
    "REAL_DTYPES",
    "PerTensor",
    "dequantize",
    "dequantize_channels",
    "dequantize_groups",
    "dynamic_source",
    "dynamically",
    "group_of",
    "insert_dequantize_channels",
    "insert_dequantize_groups",
    "insert_dynamic_pair",
    "insert_pair",
    "is_by_output",
    "is_dequantize",
    "is_quantize",
    "is_weight_dequantize",
    "per_tensor",
    "quantize",
]

REAL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the operators take."""
_OPS: Any = torch.ops.quantized_decomposed
_QUANTIZE = _OPS.quantize_per_tensor.default
_DEQUANTIZE = _OPS.dequantize_per_tensor.default
_CHOOSE = _OPS.choose_qparams.tensor
_QUANTIZE_BY = _OPS.quantize_per_tensor.tensor
_DEQUANTIZE_BY = _OPS.dequantize_per_tensor.tensor
_PER_CHANNEL = _OPS.dequantize_per_channel.default
_PER_GROUP = _OPS.dequantize_per_channel_group.default


@storable
@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for a whole tensor: a real x is ``scale * (q - zero_point)``, with q on ``grid``."""

    scale: float
    zero_point: int
    grid: Grid

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return self.scale, self.zero_point, self.grid.low, self.grid.high, self.grid.dtype

    def said(self, value: fx.Node) -> dict[str, Any]:
        """For the record of ``value``."""
        return {"value": value.name, "bits": self.grid.bits, "scale": self.scale, "zero_point": self.zero_point}


def quantize(x: Tensor, by: PerTensor) -> Tensor:
    """The integers of ``x``."""
    result: Tensor = _QUANTIZE(x, *by.arguments)
    return result


def dequantize(integers: Tensor, by: PerTensor) -> Tensor:
    """The reals of ``integers``, float32."""
    result: Tensor = _DEQUANTIZE(integers, *by.arguments)
    return result


def dequantize_channels(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int, grid: Grid) -> Tensor:
    """The reals of ``integers``, a scale for each index along ``axis``; float32."""
    result: Tensor = _PER_CHANNEL(integers, scale, zero_point, axis, grid.low, grid.high, grid.dtype)
    return result


# Each of these puts its nodes where the caller is inserting.
def insert_pair(value: fx.Node, by: PerTensor, dtype: torch.dtype) -> fx.Node:
    """``value`` as integers stand for it, as ``dtype``."""
    integers = value.graph.call_function(_QUANTIZE, (value, *by.arguments))
    return _insert_reals(_DEQUANTIZE, integers, by.arguments, dtype)


def insert_dynamic_pair(value: fx.Node, grid: Grid, dtype: torch.dtype) -> fx.Node:
    """``value`` on a scale that follows from it anew in each run."""
    graph, limits = value.graph, (grid.low, grid.high)
    chosen = graph.call_function(_CHOOSE, (value, *limits, grid.least_scale, grid.dtype))
    scale, zero_point = (graph.call_function(operator.getitem, (chosen, i)) for i in (0, 1))
    by: tuple[Any, ...] = (scale, zero_point, *limits, grid.dtype)
    integers = graph.call_function(_QUANTIZE_BY, (value, *by))
    return _insert_reals(_DEQUANTIZE_BY, integers, by, dtype)


def _insert_reals(operator_: Any, integers: fx.Node, by: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
    graph = integers.graph
    if dtype is torch.float32 or by[-1].itemsize == 1:
        return graph.call_function(operator_, (integers, *by), _out(dtype))
    # The operator makes ``dtype`` of the integers first, and float16 and bfloat16 do not hold those of 16 bits.
    return graph.call_method("to", (graph.call_function(operator_, (integers, *by)), dtype))


def insert_dequantize_channels(
    integers: fx.Node, scale: fx.Node, zero_point: fx.Node, axis: int, grid: Grid, dtype: torch.dtype
) -> fx.Node:
    """The reals of ``integers``, a scale for each index along ``axis``."""
    by = (scale, zero_point, axis, grid.low, grid.high, grid.dtype)
    return integers.graph.call_function(_PER_CHANNEL, (integers, *by), _out(dtype))


def insert_dequantize_groups(
    integers: fx.Node, scale: fx.Node, zero_point: fx.Node, size: int, grid: Grid, dtype: torch.dtype
) -> fx.Node:
    """The reals of a matrix, a scale for each ``size`` of a row."""
    by = (scale, zero_point, grid.low, grid.high, grid.dtype, size, dtype)
    return integers.graph.call_function(_PER_GROUP, (integers, *by))


def _out(dtype: torch.dtype) -> dict[str, Any]:
    return {} if dtype is torch.float32 else {"out_dtype": dtype}


def dynamically(x: Tensor, grid: Grid) -> Tensor:
    """``x`` as the integers of ``grid`` stand for it, on a scale that follows from it; float32."""
    if not x.numel():
        return x.float()
    limits = (grid.low, grid.high)
    by = (*_CHOOSE(x, *limits, grid.least_scale, grid.dtype), *limits, grid.dtype)
    result: Tensor = _DEQUANTIZE_BY(_QUANTIZE_BY(x, *by), *by)
    return result


def dynamic_source(node: Any) -> tuple[fx.Node, Grid] | None:
    """What was rounded, and to which integers, if ``node`` is the end of what :func:`insert_dynamic_pair` puts in."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not _DEQUANTIZE_BY:
        return None
    integers = node.args[0]
    if not isinstance(integers, fx.Node) or integers.target is not _QUANTIZE_BY or integers.args[1:] != node.args[1:]:
        return None
    source, scale, zero_point, low, high, dtype = integers.args
    for part, index in ((scale, 0), (zero_point, 1)):
        chosen = part.args[0] if isinstance(part, fx.Node) and part.target is operator.getitem else None
        if not isinstance(chosen, fx.Node) or chosen.target is not _CHOOSE or part.args[1] != index:  # type: ignore[union-attr]
            return None
        if chosen.args[0] is not source:
            return None
    return source, Grid(low, high, dtype)  # type: ignore[return-value, arg-type]


def group_of(node: fx.Node) -> int:
    """How many weights of a row have a scale at a node for which :func:`is_weight_dequantize` holds; 0 if all have."""
    return int(node.args[6]) if node.target is _PER_GROUP else 0  # type: ignore[arg-type]


def is_by_output(node: fx.Node) -> bool:
    """Whether it has a scale for each index of the first dimension."""
    return node.target is _PER_CHANNEL and bool(node.args[3] == 0)


def dequantize_groups(integers: Tensor, scale: Tensor, zero_point: Tensor, size: int, grid: Grid) -> Tensor:
    """The reals of a matrix, a scale for each ``size`` of a row; float32."""
    by = (scale, zero_point, grid.low, grid.high, grid.dtype, size, torch.float32)
    result: Tensor = _PER_GROUP(integers, *by)
    return result


def is_quantize(node: Any) -> bool:
    """Whether ``node`` quantises with a fixed scale."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is _QUANTIZE


def is_dequantize(node: Any) -> bool:
    """Whether ``node`` dequantises with a fixed scale."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is _DEQUANTIZE


def is_weight_dequantize(node: Any) -> bool:
    """Whether ``node`` dequantises a weight."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (_PER_CHANNEL, _PER_GROUP)


def per_tensor(node: fx.Node) -> PerTensor:
    """The scale of a node for which :func:`is_quantize` or :func:`is_dequantize` holds."""
    scale, zero_point, low, high, dtype = node.args[1:]
    return PerTensor(scale, zero_point, Grid(low, high, dtype))  # type: ignore[arg-type]
