"""Layers written as functions of integer weights: what the graph calls instead of a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress import editing, matching
from fxcompress.layers import CalledLayer, Layer
from fxcompress.passes.quantization.fake_modules import WeightFakeQuantizer
from fxcompress.passes.quantization.vocabulary import insert_dequantize_channels, insert_dequantize_groups
from fxcompress.passes.quantization.weights import IntegerWeight

__all__ = ["convert_weight", "write_fake_layer", "write_layer"]

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip


def write_layer(gm: fx.GraphModule, called: CalledLayer[Layer], weight: IntegerWeight, bias: Tensor | None) -> None:
    """Put functions in place of every call. The path of the layer then holds ``weight`` (int8), ``weight_scale``,
    ``weight_zero_point`` and ``bias``, where it had one."""
    layer, path = called.layer, called.path
    holder = nn.Module().train(layer.training)
    if bias is not None:
        holder.bias = nn.Parameter(bias, requires_grad=False)
    editing.set_attribute(gm, path, holder)
    with gm.graph.inserting_before(called.calls[0]):
        reals = _integers(gm, path, weight, layer.weight.dtype)
    _put_functions(gm, called, reals)


def write_fake_layer(gm: fx.GraphModule, called: CalledLayer[Layer], fake: WeightFakeQuantizer) -> None:
    """Put functions in place of every call that read the weight through ``fake``. The path of the layer then holds its
    parameters and, as ``weight_fake_quant``, this."""
    layer, path = called.layer, called.path
    holder = nn.Module().train(layer.training)
    holder.weight, holder.weight_fake_quant = layer.weight, fake
    if layer.bias is not None:
        holder.bias = layer.bias
    editing.set_attribute(gm, path, holder)
    with gm.graph.inserting_before(called.calls[0]):
        reals = gm.graph.call_module(f"{path}.weight_fake_quant", (gm.graph.get_attr(f"{path}.weight"),))
    _put_functions(gm, called, reals)


def convert_weight(gm: fx.GraphModule, node: fx.Node, weight: IntegerWeight) -> None:
    """Put integers in place of what ``node`` gives, a weight that it makes of a parameter."""
    (source,) = node.all_input_nodes
    path = str(source.target).rpartition(".")[0]
    dtype = editing.get_attribute(gm, str(source.target)).dtype
    with gm.graph.inserting_before(node):
        editing.replace(node, _integers(gm, path, weight, dtype))


def _integers(gm: fx.GraphModule, path: str, weight: IntegerWeight, dtype: torch.dtype) -> fx.Node:
    """Nodes that make reals of ``weight``, which what is at ``path`` holds from now on."""
    holder, graph = gm.get_submodule(path), gm.graph
    holder.weight = nn.Parameter(weight.integers.contiguous(), requires_grad=False)
    holder.register_buffer("weight_scale", weight.scale)
    holder.register_buffer("weight_zero_point", torch.zeros_like(weight.scale, dtype=torch.int64))
    integers = graph.get_attr(f"{path}.weight")
    scale, zero_point = (graph.get_attr(f"{path}.weight_{name}") for name in ("scale", "zero_point"))
    if weight.axis is not None:
        return insert_dequantize_channels(integers, scale, zero_point, weight.axis, weight.grid, dtype)
    shape = tuple(weight.integers.shape)
    if len(shape) > 2:
        integers = graph.call_function(torch.reshape, (integers, (shape[0], -1)))
    reals = insert_dequantize_groups(integers, scale, zero_point, weight.group, weight.grid, dtype)
    return reals if len(shape) == 2 else graph.call_function(torch.reshape, (reals, shape))


def _put_functions(gm: fx.GraphModule, called: CalledLayer[Layer], weight: fx.Node) -> None:
    """Functions of ``weight``, and of the bias that the layer's path holds, in place of every call."""
    layer = called.layer
    for call in called.calls:
        source = matching.tensor_input(call)
        assert source is not None, "a call with one tensor"
        with gm.graph.inserting_before(call):
            bias = None if layer.bias is None else gm.graph.get_attr(f"{called.path}.bias")
            editing.replace(call, _call(layer, source, weight, bias))


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
