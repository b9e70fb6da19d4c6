"""Quantisation-aware training: fake-quantise modules where ``quantize`` would round, and their conversion (RETRAIN)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcompress import editing, matching
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.errors import PreconditionError
from fxcompress.layers import CalledLayer, Layer
from fxcompress.pass_base import Guarantee, Need, Observation, PassContext, Refusal, Site, Stage
from fxcompress.passes.quantization.deciding import Found, RoundingPass
from fxcompress.passes.quantization.emission import convert_weight, write_fake_layer
from fxcompress.passes.quantization.fake_modules import FakeQuantizer, WeightFakeQuantizer
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.placement import Value
from fxcompress.passes.quantization.vocabulary import PerTensor, insert_pair
from fxcompress.passes.quantization.weights import Granularity, IntegerWeight, relative_norm, weight_as_integers

__all__ = ["FakeQuantize", "conversions", "is_fake_quantized"]


@dataclasses.dataclass(frozen=True)
class FakeQuantize(RoundingPass):
    """Put in modules that round as ``quantize`` would, to train with: quantisation-aware training.

    Fold batch norms before (``["fold-batch-norm", "fake-quantize"]``): one that is left is trained, and later computed,
    in real numbers. Then call ``train()`` and train as any model. ``quantize``, with no options and no calibration
    data, makes integers of the trained graph: the same that it computed with.

    Args:
        weight_bits, activation_bits, granularity, symmetric, observer: see :class:`RoundingPass`.
        keep_ends, round_addends, overrides, exclude, only: see :class:`RoundingPass`.
        learned: train scales along with weights (learned step sizes, Esser et al. 2020, arXiv 1902.08153), but for
            those that no gradient reaches and those of frozen weights; zero points stay. Otherwise scales of values
            stay as the calibration data had them, and those of weights stay in the proportion to the largest weight
            that they begin with, with the least square error.

    There is a site for each layer (detail: ``module``, ``weight_bits``, ``activation_bits``, ``granularity``) and for
    each value that is rounded (``value``, ``bits``, ``scale``, ``zero_point``). Tables of embeddings stay real.
    """

    name: ClassVar[str] = "fake-quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    before: ClassVar[frozenset[str]] = frozenset({"quantize", "lower-int8"})
    why_after: ClassVar[str] = "layers that round their weights are not found as layers any more"
    stage: ClassVar[Stage] = Stage.ROUND
    pays_with: ClassVar[frozenset[str]] = frozenset({"quantize"})
    timed: ClassVar[bool] = False

    learned: bool = False

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        super().requires(context)
        if is_fake_quantized(context.gm):
            raise PreconditionError(f"{self.name}: the model is fake-quantised already; give the one before that")

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        if context.batches is not None:
            yield from self.ranges(context, Found.of(self, context))

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: values first, then layers."""
        found = Found.of(self, context)
        trained = _trained(context) if self.learned else frozenset()
        for number, group in enumerate(found.placement.sharing()):
            by = self.scale(context, self.grid(found, group), number, group)
            readers = {reader for value in group for reader in value.readers}
            shared = _Values(context.gm, by, not trained.isdisjoint(readers))
            for value in group:
                yield Site(value.node, (shared, value), by.said(value.node))
        for called in found.layers:
            settings = found.settings[called.path]
            fake = _Weight(context.gm, called, Grid.of_weights(settings["weight_bits"]), settings["granularity"])
            learned = called.layer.weight.requires_grad and not trained.isdisjoint(called.calls)
            yield Site(called.calls[0], (fake, learned), {"module": called.path, **settings})
        yield from found.refusals

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        work, with_ = site.data
        work.operate(with_)


def _trained(context: PassContext) -> frozenset[fx.Node]:
    """The nodes to which a gradient of an output can come back: not before ``detach``, integers or sizes."""
    found: set[fx.Node] = set()
    for node in reversed(context.gm.graph.nodes):
        if node.op != "output":
            spec = context.shapes[node]
            if isinstance(spec, int) or (isinstance(spec, TensorSpec) and not spec.dtype.is_floating_point):
                continue
        if matching.is_call(node, ("detach", "detach_")):
            continue
        if node.op == "output" or editing.is_inplace(node) or not found.isdisjoint(node.users):
            found.add(node)
    return frozenset(found)


class _Values:
    """Values on one scale, which one module rounds."""

    def __init__(self, gm: fx.GraphModule, by: PerTensor, learned: bool) -> None:
        self._gm, self._by, self._learned = gm, by, learned
        self._path: str | None = None

    def operate(self, value: Value) -> None:
        """Let the readers of ``value`` read what the module makes of it."""
        if self._path is None:
            tensors: Iterable[Tensor] = (*self._gm.parameters(), *self._gm.buffers())
            device = next((t.device for t in tensors), None)
            module = FakeQuantizer(self._by, self._learned, device).train(self._gm.training)
            self._path = editing.add_module(self._gm, f"{value.node.name}_fake_quant", module)
        path = self._path
        value.replace(lambda: self._gm.graph.call_module(path, (value.node,)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Weight:
    """A layer whose weight is rounded when it is read."""

    gm: fx.GraphModule
    called: CalledLayer[Layer]
    grid: Grid
    granularity: Granularity

    def operate(self, learned: bool) -> None:
        """Put that in."""
        start = weight_as_integers(self.called.layer, self.grid, self.granularity)
        alike = bool((start.scale == start.scale[0]).all()) and self.granularity == "tensor"
        scale = (start.scale[:1] if alike else start.scale).clone()
        if not learned:
            whole = WeightFakeQuantizer(self.grid, torch.ones_like(scale), start.axis, start.group, learned)
            scale /= whole.integers(self.called.layer.weight)[1]
        fake = WeightFakeQuantizer(self.grid, scale, start.axis, start.group, learned)
        write_fake_layer(self.gm, self.called, fake.train(self.called.layer.training))


# ------------------------------------------------------------------------------------------------- conversion
def is_fake_quantized(gm: fx.GraphModule) -> bool:
    """Whether there are fake-quantise modules in ``gm``."""
    return any(isinstance(m, (FakeQuantizer, WeightFakeQuantizer)) for m in gm.modules())


def conversions(context: PassContext) -> Iterator[Site]:
    """A site for each call of a fake-quantise module; :meth:`operate` of its data puts integers in its place."""
    for node in context.gm.graph.nodes:
        module = matching.called(context.gm, node, FakeQuantizer, WeightFakeQuantizer)
        if isinstance(module, FakeQuantizer):
            by, source = module.by(), matching.tensor_input(node)
            assert source is not None, "it was put in with one"
            data = _Converted(node, source, by, context.shapes.dtype(source))
            yield Site(node, data, {**by.said(source), "converted": True})
        elif isinstance(module, WeightFakeQuantizer):
            (source,) = node.all_input_nodes
            weight = _ConvertedWeight(context.gm, node, module)
            detail = {"module": str(source.target).rpartition(".")[0], "weight_bits": module.grid.bits}
            yield Site(node, weight, {**detail, "converted": True})


@dataclasses.dataclass(frozen=True, eq=False)
class _Converted:
    """A value that a module rounds."""

    node: fx.Node
    source: fx.Node
    by: PerTensor
    dtype: torch.dtype

    def operate(self) -> None:
        """Let operators do it."""
        with self.node.graph.inserting_before(self.node):
            editing.replace(self.node, insert_pair(self.source, self.by, self.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class _ConvertedWeight:
    """A weight that a module rounds."""

    gm: fx.GraphModule
    node: fx.Node
    module: WeightFakeQuantizer

    def operate(self) -> Mapping[str, Any]:
        """Store it as integers."""
        (source,) = self.node.all_input_nodes
        real = editing.get_attribute(self.gm, str(source.target)).detach()
        integers, scale = self.module.integers(real)
        if self.module.axis is not None:
            scale = scale.expand(real.shape[self.module.axis]).clone()
        with torch.no_grad():
            error = relative_norm(self.module(real) - real, real)
        weight = IntegerWeight(integers, scale, self.module.grid, self.module.axis, self.module.group, error)
        convert_weight(self.gm, self.node, weight)
        return {"weight_error": error}
