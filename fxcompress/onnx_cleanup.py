"""Graphs of ONNX written so that runtimes find the integer kernels: no number that they compute changes.

Importing this module needs ``onnx_ir``, which comes with ``onnxscript``.
"""

from __future__ import annotations

import numpy
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["clean_up"]

_FEW_BITS = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16))
_ROUND = frozenset(("Clip", "QuantizeLinear", "DequantizeLinear"))
_LEAST_SCALE = 1e-30
"""Above this, products of a scale and an integer of 16 bits are no subnormal numbers."""


def clean_up(model: ir.Model) -> None:
    """Simplify what is around quantised layers, in place.

    - Zeros around a convolution's input are padding of that convolution, whatever is quantised in between; as an
      operator of its own, padding copies the tensor. (PyTorch's convolutions cannot pad one side alone.)
    - What is on a grid and quantised to it again stays the integers that it is.
    - Weights whose zero points are all zero have none: with them, OpenVINO 2026.4 computes some linear layers in
      float32.
    """
    for node in model.graph:
        if node.op_type == "Conv":
            _take_padding(node)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            _stay_integers(node)
        elif node.op_type == "DequantizeLinear":
            _omit_zeros(node)
    RemoveUnusedNodesPass()(model)


def _constant(value: ir.Value | None) -> numpy.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _grid(node: ir.Node) -> tuple[float, int, ir.DataType] | None:
    """Scale, zero point and dtype, if these are constants and the same for the whole tensor."""
    scale, zero_point, of = _constant(_input(node, 1)), _constant(_input(node, 2)), _input(node, 2)
    if scale is None or zero_point is None or of is None or of.dtype is None or scale.size != 1:
        return None
    return scale.item(), zero_point.item(), of.dtype


# ------------------------------------------------------------------------------------------------- padding
def _take_padding(conv: ir.Node) -> None:
    """Pad in ``conv`` what is padded before, if nothing else reads that."""
    between: list[ir.Node] = []
    value = conv.inputs[0]
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return
        if node.op_type == "Pad":
            if _zero_stays(between) and _added(node, conv):
                first, source = (between[-1] if between else conv), node.inputs[0]
                first.replace_input_with(0, source)
                for moved in between:
                    moved.outputs[0].shape = None if source is None or source.shape is None else source.shape.copy()
            return
        if node.op_type not in _ROUND:
            return
        between.append(node)
        value = node.inputs[0]


def _zero_stays(nodes: list[ir.Node]) -> bool:
    """Whether zero comes out where zero goes in, through what only rounds and limits; the last node is the first."""
    quantised = None
    for node in reversed(nodes):
        if node.op_type == "Clip" and quantised is None:
            low, high = (_input(node, i) for i in (1, 2))
            ends = _constant(low), _constant(high)
            if (low is not None and ends[0] is None) or (high is not None and ends[1] is None):
                return False
            if (ends[0] is not None and ends[0].item() > 0) or (ends[1] is not None and ends[1].item() < 0):
                return False
        elif node.op_type == "QuantizeLinear" and quantised is None:
            quantised = _grid(node)
            if quantised is None:
                return False
        elif node.op_type == "DequantizeLinear" and quantised is not None:
            if _grid(node) != quantised:
                return False
            quantised = None
        else:
            return False
    return quantised is None


def _added(pad: ir.Node, conv: ir.Node) -> bool:
    """Make padding with zeros that of the convolution too; false, and nothing done, if it is of another kind."""
    mode, automatic = pad.attributes.get("mode"), conv.attributes.get("auto_pad")
    if (mode is not None and mode.as_string() != "constant") or _input(pad, 3) is not None:
        return False
    if automatic is not None and automatic.as_string() != "NOTSET":
        return False
    value, ends = _constant(_input(pad, 2)), _constant(_input(pad, 1))
    if (_input(pad, 2) is not None and (value is None or value.item() != 0)) or ends is None or ends.min() < 0:
        return False
    rank = ends.size // 2
    if any(ends[[0, 1, rank, rank + 1]]):  # batch and channels
        return False
    spatial = [*ends[2:rank].tolist(), *ends[rank + 2 :].tolist()]
    own = conv.attributes.get("pads")
    sums = spatial if own is None else [a + b for a, b in zip(spatial, own.as_ints(), strict=True)]
    conv.attributes["pads"] = ir.AttrInt64s("pads", sums)
    return True


# ------------------------------------------------------------------------------------------------- integers
def _stay_integers(quantize: ir.Node) -> None:
    """Use the integers that were dequantised instead of those that are quantised from them again, to the same grid."""
    value, output = quantize.inputs[0], quantize.outputs[0]
    before = None if value is None else value.producer()
    grid = _grid(quantize)
    if before is None or before.op_type != "DequantizeLinear" or grid is None or output.is_graph_output():
        return
    # The product and the quotient round by 2^-24 each, far less than half an integer of 16 bits.
    if _grid(before) == grid and grid[2] in _FEW_BITS and grid[0] > _LEAST_SCALE:
        integers = before.inputs[0]
        assert integers is not None
        output.replace_all_uses_with(integers)


def _omit_zeros(dequantize: ir.Node) -> None:
    """Zero is the default for a zero point."""
    zero_points = _constant(_input(dequantize, 2))
    stored = _constant(_input(dequantize, 0))
    if stored is not None and zero_points is not None and not zero_points.any():
        dequantize.resize_inputs(2)
