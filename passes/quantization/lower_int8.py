"""Integer kernels in place of the reference graph that ``quantize`` makes (APPROXIMATE: within a quantum each).

Where a layer reads dequantised integers, the layer, what is added to its result, the activation function and the
rounding that follow become one call of an int8 kernel of oneDNN (``kernels.py``). Operations that only move integers
work on them directly. What is left of quantising and dequantising stands at the borders to real numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.pass_base import Guarantee, Need, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.quantization.kernels import unavailable
from fxcompress.passes.quantization.lowering_between import Moved, Reshaped, Rounded, Shifted
from fxcompress.passes.quantization.lowering_layers import EIGHT_BITS, FoundLayers, LayerLowering
from fxcompress.passes.quantization.lowering_linears import LinearLowering, lowering_of
from fxcompress.passes.quantization.vocabulary import is_dequantize, is_quantize

__all__ = ["LowerInt8"]


@dataclasses.dataclass(frozen=True)
class LowerInt8(Pass):
    """Let quantised layers run on the int8 kernels of oneDNN, eagerly.

    Linear layers that choose the scale of what they read in each call run on the same kernels; those of which only the
    weights are integers run on kernels that multiply few rows in bfloat16, with an error of about 0.3%.

    Put it last: ``["fold-batch-norm", "quantize", "lower-int8"]``. On a machine whose processor or build of PyTorch has
    no such kernels the graph stays as it is, and the record says why. ``torch.compile`` of the reference graph is
    the other way to the same kernels; it also works on the graph that this pass makes, whose modules show it what they
    stand for.

    Detail of a site: ``op``, which is ``"layer"``, ``"dynamic layer"``, ``"weight-only layer"`` or what is done between
    them, and for a layer ``module``, ``post``, ``adds`` (``"integers"``, ``"reals"`` or ``None``), ``gives``
    (``"integers"`` or ``"reals"``).
    """

    name: ClassVar[str] = "lower-int8"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    trainable: ClassVar[bool] = False
    after: ClassVar[frozenset[str]] = frozenset({"quantize"})
    why_after: ClassVar[str] = "it acts on integer weights, and leaves kernels where layers were"
    stage: ClassVar[Stage] = Stage.LOWER

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: layers, then what is between them."""
        found = FoundLayers(context)
        lowerings: list[LayerLowering | LinearLowering] = [*found.lowerings]
        refusals = list(found.refusals)
        for layer in found.on_reals:
            lowering = lowering_of(context, layer)
            if isinstance(lowering, str):
                refusals.append(Refusal(layer, lowering))
            else:
                lowerings.append(lowering)
        if lowerings and (reason := unavailable()):
            yield from (Refusal(lowering.layer, reason) for lowering in lowerings)
            return
        yield from (Site(lowering.layer, lowering, lowering.said()) for lowering in lowerings)
        if found.lowerings:
            yield from self._between(context, found)
        yield from refusals

    def _between(self, context: PassContext, found: FoundLayers) -> Iterator[Site]:
        memory = Memory(context.gm, lambda node: isinstance(context.shapes[node], TensorSpec))
        for node in context.gm.graph.nodes:
            if node.op == "call_method" and node.target == "view" and memory.writer_after(node) is None:
                yield Site(node, Reshaped(node), {"op": "reshape"})
            if is_dequantize(node) and node.args[-1] is torch.int8:
                yield Site(node, Shifted(node), {"op": "shift"})
        for node in context.gm.graph.nodes:
            if is_quantize(node) and node not in found.absorbed and node.args[-1] in EIGHT_BITS:
                moved = Moved.of(context, node)
                yield Site(node, moved or Rounded(node), {"op": "round" if moved is None else "move"})

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        site.data.operate()
