"""Linear layers of integer weights that read real numbers, on the kernels of ``kernels_linear.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.pass_base import PassContext
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import Int8Layer, PostOp
from fxcompress.passes.quantization.kernels_linear import DynamicInt8Linear, WeightOnlyLinear, has_int4_kernel
from fxcompress.passes.quantization.lowering_layers import path_of, post_op
from fxcompress.passes.quantization.placement import chain_of
from fxcompress.passes.quantization.vocabulary import dynamic_source, group_of

__all__ = ["LinearLowering", "lowering_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLowering:
    """A linear layer that becomes a call of a kernel.

    Attributes:
        gm: the graph module.
        layer: the node.
        source: the real numbers that it reads.
        nodes: what the kernel does, from the layer to the last.
        post: the activation function.
        grid: of the integers to which it rounds what it reads; ``None`` if it does not.
        group: how many weights of a row have a scale; 0 if all have.
    """

    gm: fx.GraphModule
    layer: fx.Node
    source: fx.Node
    nodes: tuple[fx.Node, ...]
    post: PostOp
    grid: Grid | None
    group: int

    def said(self) -> dict[str, Any]:
        """For the record."""
        op = "weight-only layer" if self.grid is None else "dynamic layer"
        return {"op": op, "module": path_of(self.layer), "post": self.post.name, "adds": None, "gives": "reals"}

    def operate(self) -> None:
        """Put the kernel in place of all that it does."""
        path = path_of(self.layer)
        holder = self.gm.get_submodule(path)
        if self.grid is None:
            module: nn.Module = WeightOnlyLinear(holder, self.group)
        else:
            module = DynamicInt8Linear(holder, self.grid, self.post)
        if isinstance(holder, (Int8Layer, WeightOnlyLinear)):  # an earlier call of the same weight took it
            path = editing.add_module(self.gm, path, module)
        else:
            editing.set_attribute(self.gm, path, module)
        last = self.nodes[-1]
        source = self.layer.args[0]
        if (rounded := dynamic_source(source)) is not None:
            source = rounded[0]
        with last.graph.inserting_before(last):
            editing.replace(last, last.graph.call_module(path, (source,)))
        for node in self.nodes[-2::-1]:  # in place on what the layer gave, perhaps, and so not dead by itself
            editing.erase(node)


def lowering_of(context: PassContext, layer: fx.Node) -> LinearLowering | str:
    """What becomes of ``layer``, a linear layer of integer weights in float32 that reads no integers of a fixed scale;
    or why it stays."""
    reals = layer.args[1]
    assert isinstance(reals, fx.Node), "a weight that was dequantised"
    group, rounded = group_of(reals), dynamic_source(layer.args[0])
    if rounded is None:
        weight = context.gm.get_parameter(f"{path_of(layer)}.weight")
        if group and not has_int4_kernel(weight, group):
            return "its groups of weights fit no int4 kernel (4 bits, 32, 64, 128 or 256 in a group, rows by 32)"
        if reals.target is torch.ops.quantized_decomposed.dequantize_per_channel.default and reals.args[3] != 0:
            return "its weight has other scales than one for each output channel"
        source = matching.tensor_input(layer)
        assert source is not None, "a layer reads a tensor"
        return LinearLowering(context.gm, layer, source, (layer,), PostOp(), None, group)
    source, grid = rounded
    if group:
        return "its weight has other scales than one for each output channel"
    if grid.dtype not in (torch.uint8, torch.int8):
        return "reads integers of more than 8 bits"
    if grid.dtype is torch.int8:
        grid = Grid(grid.low + 128, grid.high + 128, torch.uint8)
    chain = chain_of(context, layer, adds=False)
    nodes, post = chain.nodes, PostOp()
    if chain.activation is not None:
        found = post_op(context.gm, chain.activation, linear=True)
        post = found or post
        nodes = nodes if found is not None else nodes[: nodes.index(chain.activation)]
    return LinearLowering(context.gm, layer, source, nodes, post, grid, 0)
