"""Tables of embeddings as integers with a scale for each row: rows are looked up as integers and made real then."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.layers import CalledLayer
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.vocabulary import REAL_DTYPES
from fxcompress.passes.quantization.weights import rows_as_integers

__all__ = ["EmbeddingRounding", "obstacle_to_embedding"]


def obstacle_to_embedding(called: CalledLayer[nn.Embedding]) -> str | None:
    """Why a table cannot become integers."""
    layer = called.layer
    if layer.max_norm is not None:
        return "writes to its weight, as it has a max_norm"
    if layer.weight.dtype not in REAL_DTYPES:
        return f"its weight is {layer.weight.dtype}, not float32, float16 or bfloat16; use model.float()"
    if not bool(torch.isfinite(layer.weight).all()):
        return "its weight is not finite"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingRounding:
    """A table that becomes integers.

    Attributes:
        gm: the graph module.
        called: the layer.
        grid: of the integers.
    """

    gm: fx.GraphModule
    called: CalledLayer[nn.Embedding]
    grid: Grid

    def operate(self) -> dict[str, Any]:
        """Put lookups of integers in place of every call."""
        layer, path = self.called.layer, self.called.path
        integers, scale, error = rows_as_integers(layer.weight.detach(), self.grid)
        holder = nn.Module().train(layer.training)
        holder.weight = nn.Parameter(integers, requires_grad=False)
        holder.register_buffer("weight_scale", scale)
        editing.set_attribute(self.gm, path, holder)
        for call in self.called.calls:
            graph, indices = call.graph, matching.tensor_input(call)
            with graph.inserting_before(call):
                weight, scales = (graph.get_attr(f"{path}.{name}") for name in ("weight", "weight_scale"))
                rows = graph.call_function(F.embedding, (indices, weight))
                column = graph.call_method("unsqueeze", (scales, 1))
                by = graph.call_function(F.embedding, (indices, column))
                reals = graph.call_function(torch.mul, (rows, by))  # promotes to the dtype of scales
                editing.replace(call, reals)
        return {"weight_error": error}
