"""Layers written as functions of integer weights: what the graph calls instead of a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress import editing, matching
from fxcompress.layers import CalledLayer, Layer
from fxcompress.passes.quantization.vocabulary import insert_dequantize_channels, insert_dequantize_groups
from fxcompress.passes.quantization.weights import IntegerWeight

__all__ = ["write_layer"]

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip


def write_layer(gm: fx.GraphModule, called: CalledLayer[Layer], weight: IntegerWeight, bias: Tensor | None) -> None:
    """Put functions in place of every call. The path of the layer then holds ``weight`` (int8), ``weight_scale``,
    ``weight_zero_point`` and ``bias``, where it had one."""
    layer, path = called.layer, called.path
    editing.set_attribute(gm, path, _holder(layer, weight, bias))
    with gm.graph.inserting_before(called.calls[0]):
        parts = [gm.graph.get_attr(f"{path}.{name}") for name in ("weight", "weight_scale", "weight_zero_point")]
        reals = _reals(layer, weight, *parts)
    for call in called.calls:
        source = matching.tensor_input(call)
        assert source is not None, "a call with one tensor"
        with gm.graph.inserting_before(call):
            offset = None if bias is None else gm.graph.get_attr(f"{path}.bias")
            editing.replace(call, _call(layer, source, reals, offset))


def _holder(layer: Layer, weight: IntegerWeight, bias: Tensor | None) -> nn.Module:
    holder = nn.Module().train(layer.training)
    holder.weight = nn.Parameter(weight.integers, requires_grad=False)
    if bias is not None:
        holder.bias = nn.Parameter(bias, requires_grad=False)
    holder.register_buffer("weight_scale", weight.scale)
    holder.register_buffer("weight_zero_point", torch.zeros_like(weight.scale, dtype=torch.int64))
    return holder


def _reals(layer: Layer, weight: IntegerWeight, integers: fx.Node, scale: fx.Node, zero_point: fx.Node) -> fx.Node:
    dtype, graph = layer.weight.dtype, integers.graph
    if weight.axis is not None:
        return insert_dequantize_channels(integers, scale, zero_point, weight.axis, weight.grid, dtype)
    shape = tuple(layer.weight.shape)
    if len(shape) > 2:
        integers = graph.call_function(torch.reshape, (integers, (shape[0], -1)))
    reals = insert_dequantize_groups(integers, scale, zero_point, weight.group, weight.grid, dtype)
    return reals if len(shape) == 2 else graph.call_function(torch.reshape, (reals, shape))


def _call(layer: Layer, source: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    graph = source.graph
    if isinstance(layer, nn.Linear):
        return graph.call_function(F.linear, (source, weight, bias))
    function, padding = _CONVOLUTIONS[type(layer)], layer.padding
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        options = (layer.stride, padding, layer.output_padding, layer.groups, layer.dilation)
        return graph.call_function(function, (source, weight, bias, *options))
    if layer.padding_mode != "zeros":
        around = tuple(layer._reversed_padding_repeated_twice)
        source = graph.call_function(F.pad, (source, around), {"mode": layer.padding_mode})
        padding = (0,) * len(layer.kernel_size)
    elif isinstance(padding, str):
        around = tuple(layer._reversed_padding_repeated_twice[::-1])
        if around[::2] == around[1::2]:  # as much before as after
            padding = around[::2]
    return graph.call_function(function, (source, weight, bias, layer.stride, padding, layer.dilation, layer.groups))
