"""Linear layers of integer weights that read real numbers, on the kernels of ``kernels_linear.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from fxcompress import editing
from fxcompress.pass_base import PassContext
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import IntegerLayer, PostOp
from fxcompress.passes.quantization.kernels_linear import DynamicInt8Linear, WeightOnlyLinear, unfit
from fxcompress.passes.quantization.lowering_between import unsigned_grid
from fxcompress.passes.quantization.lowering_layers import EIGHT_BITS, OTHER_SCALES, fused, path_of, put_kernel
from fxcompress.passes.quantization.placement import chain_of
from fxcompress.passes.quantization.vocabulary import dynamic_source, group_of, is_by_output

__all__ = ["LinearLowering", "lowering_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLowering:
    """A linear layer that becomes a call of a kernel.

    Attributes:
        gm: the graph module.
        layer: the node.
        nodes: what the kernel does, from the layer to the last.
        post: the activation function.
        grid: of the integers to which it rounds what it reads; ``None`` if it does not.
        group: how many weights of a row have a scale; 0 if all have.
    """

    gm: fx.GraphModule
    layer: fx.Node
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
        holder = self.gm.get_submodule(path_of(self.layer))
        module: IntegerLayer
        if self.grid is None:
            module = WeightOnlyLinear(holder, self.group)
        else:
            module = DynamicInt8Linear(holder, self.grid, self.post)
        path = put_kernel(self.gm, self.layer, module)
        last = self.nodes[-1]
        reads = self.layer.args[0]  # as it is now: a kernel may have taken its place
        rounded = dynamic_source(reads)
        source = reads if rounded is None else rounded[0]
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
    if not group and not is_by_output(reals):
        return OTHER_SCALES
    if rounded is None:
        weight = context.gm.get_parameter(f"{path_of(layer)}.weight")
        if reason := unfit(weight, group):
            return reason
        return LinearLowering(context.gm, layer, (layer,), PostOp(), None, group)
    if group:
        return OTHER_SCALES
    grid = rounded[1]
    if grid.dtype not in EIGHT_BITS:
        return "reads integers of more than 8 bits"
    nodes, post = fused(context.gm, chain_of(context, layer, adds=False))
    return LinearLowering(context.gm, layer, nodes, post, unsigned_grid(grid), 0)
