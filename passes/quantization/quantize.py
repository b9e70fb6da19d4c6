"""Quantise layers: integer weights, and integer activations between the layers (APPROXIMATE).

The graph that comes out is a *reference*: every layer computes in real numbers, on weights and inputs that were
rounded to integers and back by ``quantized_decomposed`` nodes, with weights really stored as int8. It runs anywhere;
``lower-int8`` or ``torch.compile`` turn it into integer kernels. What is rounded where is decided in ``placement.py``.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress.analysis.moments import Moments, MomentsObserver
from fxcompress.analysis.patches import READABLE
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.layers import CalledLayer, Layer
from fxcompress.pass_base import Guarantee, Knob, Need, Observation, PassContext, Refusal, Site, Stage
from fxcompress.passes.quantization.deciding import Found, RoundingPass
from fxcompress.passes.quantization.embeddings import EmbeddingRounding
from fxcompress.passes.quantization.emission import write_layer
from fxcompress.passes.quantization.fake_quantize import conversions, is_fake_quantized
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.placement import Value
from fxcompress.passes.quantization.sequential import Rounded, SequentialRounding, has_moments
from fxcompress.passes.quantization.vocabulary import PerTensor, insert_dynamic_pair, insert_pair
from fxcompress.passes.quantization.weights import Granularity, missing_rows, weight_as_integers

__all__ = ["Quantize"]


@dataclasses.dataclass(frozen=True)
class Quantize(RoundingPass):
    """Round weights and activations to integers.

    Fold batch norms before (``["fold-batch-norm", "quantize"]``): one that is left is computed in real numbers. Tables
    of embeddings become integers of 8 bits, a scale for each row, unless ``overrides`` say otherwise.

    Args:
        weight_bits, activation_bits, granularity, symmetric, observer: see :class:`RoundingPass`.
        keep_ends, round_addends, overrides, exclude, only: see :class:`RoundingPass`.
        dynamic: choose the scales of activations anew in each run, from the values at hand, instead of from
            calibration data.
        rounding: of weights: to the ``"nearest"`` integers, or ``"adaptive"``, so that outputs change least on the
            calibration data, which pays below 8 bits; see ``rounding.py`` and ``sequential.py``. The data must fit in
            memory, at each layer with what the layers before it left of it.
        correct_bias: where there is calibration data, let biases take up what the rounding of weights changes in the
            mean (Nagel et al. 2019, arXiv 1906.04721, section 4.2).

    A graph that ``fake-quantize`` made becomes integers by its own settings, the same that it computed with; then give
    no options, and no calibration data is needed.

    There is a site for each layer (detail: ``module``, ``weight_bits``, ``activation_bits``, ``granularity``,
    ``weight_error`` relative to the norm of the weight) and for each value that is rounded (``value``, ``bits``,
    and unless it is dynamic ``scale``, ``zero_point``).
    """

    name: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    trainable: ClassVar[bool] = False
    why_after: ClassVar[str] = "layers with integer weights are not found as layers any more"
    stage: ClassVar[Stage] = Stage.ROUND
    pays_with: ClassVar[frozenset[str]] = frozenset({"lower-int8"})

    without_data: ClassVar[str] = "dynamic=True or activation_bits=None"

    dynamic: bool = False
    rounding: Literal["nearest", "adaptive"] = "nearest"
    correct_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in ("nearest", "adaptive"):
            raise UsageError(f"rounding is 'nearest' or 'adaptive', got {self.rounding!r}")
        if self.dynamic and self.activation_bits is None:
            raise UsageError("dynamic is about activations, and activation_bits=None leaves them real; drop one")

    # ------------------------------------------------------------------------------------------------- the contract
    def calibration_reads(self) -> int:
        """See :meth:`Pass.calibration_reads`."""
        return super().calibration_reads() + int(self.rounding == "adaptive")

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        if is_fake_quantized(context.gm):
            self._converts(context)
            return
        super().requires(context)
        if context.batches is None and self.rounding == "adaptive":
            raise PreconditionError(f"{self.name}: adaptive rounding looks at data; pass `calibration`")

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        if context.batches is None or is_fake_quantized(context.gm):
            return
        found = Found.of(self, context)
        for called in found.layers:
            layer = called.layer
            if isinstance(layer, READABLE) and self._looks_at_inputs(called):
                factory = partial(MomentsObserver, layer, second=self.rounding == "adaptive")
                for source in called.sources:
                    yield Observation(source, _inputs_of(called), factory)
        yield from self.ranges(context, found)

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: values first, then layers; of a fake-quantised graph in its own order."""
        if is_fake_quantized(context.gm):
            yield from conversions(context)
            return
        found = Found.of(self, context)
        for number, group in enumerate(found.placement.sharing()):
            grid = self.grid(found, group)
            by = None if self.dynamic else self.scale(context, grid, number, group)
            for value in group:
                data = _Rounding(value, by, grid, context.shapes.dtype(value.node))
                yield Site(value.node, data, data.said())
        sequential = None
        if self.rounding == "adaptive":
            assert context.batches is not None, "asked for in requires()"
            sequential = SequentialRounding(context.gm, context.batches)
        for called in found.layers:
            settings = found.settings[called.path]
            weights = _Weights(
                context.gm,
                called,
                Grid.of_weights(settings["weight_bits"]),
                settings["granularity"],
                self._moments(context, called),
                sequential,
            )
            yield Site(called.calls[0], weights, {"module": called.path, **settings})
        for table in found.embeddings:
            bits = self.settings(table.paths, embedding=True)["weight_bits"]
            rounding = EmbeddingRounding(context.gm, table, Grid.of_weights(bits))
            yield Site(table.calls[0], rounding, {"module": table.path, "weight_bits": bits})
        yield from found.refusals

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """See :meth:`Pass.rewrite`."""
        said: Mapping[str, Any] | None = site.data.operate()
        return said

    # ------------------------------------------------------------------------------------------------- for a search
    def knobs(self, context: PassContext) -> Iterator[Knob]:
        """See :meth:`Pass.knobs`: for each layer and table whether it is quantised.

        Fewer bits are not offered, as integers are stored as int8 whatever their bits.
        """
        if is_fake_quantized(context.gm):
            return
        found = Found.of(self, context)
        for path in (*(c.path for c in found.layers), *(c.path for c in found.embeddings)):
            yield Knob(path, "bits", (self.weight_bits,))

    def turned(self, settings: Mapping[str, float]) -> Quantize:
        """See :meth:`Pass.turned`."""
        bits = {glob.escape(layer): int(n) for layer, n in settings.items()}
        others = {layer: {"weight_bits": n} for layer, n in bits.items() if n != self.weight_bits}
        return dataclasses.replace(self, only=tuple(bits), overrides={**self.overrides, **others})

    # ------------------------------------------------------------------------------------------------- options
    def _converts(self, context: PassContext) -> None:
        """Refuse options that a fake-quantised graph has settled, and one in training mode."""
        self.check_mode(context)
        default = type(self)()
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        if changed:
            raise PreconditionError(
                f"{self.name}: the model was trained with the settings that fake-quantize was given, and becomes "
                f"integers by these; drop {', '.join(changed)}"
            )

    @property
    def is_static(self) -> bool:
        """Whether the scales of activations come from calibration data."""
        return super().is_static and not self.dynamic

    # ------------------------------------------------------------------------------------------------- statistics
    def _looks_at_inputs(self, called: CalledLayer[Layer]) -> bool:
        """Whether what a layer reads is looked at, to round its weight by or to correct its bias."""
        if self.rounding == "adaptive":
            return not SequentialRounding.takes(called) and has_moments(called)
        return self.correct_bias and called.layer.bias is not None

    def _moments(self, context: PassContext, called: CalledLayer[Layer]) -> Moments | None:
        found = (context.statistics.get((source, _inputs_of(called))) for source in called.sources)
        merged = Moments.merged([m for m in found if m is not None])
        return None if merged is None or not merged.is_finite() else merged


def _inputs_of(called: CalledLayer[Layer]) -> str:
    return f"inputs of {called.path}"


# ------------------------------------------------------------------------------------------------- what is done
@dataclasses.dataclass(frozen=True, eq=False)
class _Rounding:
    """A value to be rounded to a scale; to one of its own in each run where there is none."""

    value: Value
    by: PerTensor | None
    grid: Grid
    dtype: torch.dtype

    def said(self) -> dict[str, Any]:
        if self.by is not None:
            return self.by.said(self.value.node)
        return {"value": self.value.node.name, "bits": self.grid.bits}

    def operate(self) -> None:
        self.value.replace(self._rounded)

    def _rounded(self) -> fx.Node:
        node = self.value.node
        if self.by is None:
            return insert_dynamic_pair(node, self.grid, self.dtype)
        return insert_pair(node, self.by, self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Weights:
    """A layer whose weight becomes integers.

    Attributes:
        gm: the graph module.
        called: the layer.
        grid: of the integers.
        granularity: of the scales.
        moments: of what the layer reads, where that was looked at.
        sequential: rounds adaptively, if that is wanted.
    """

    gm: fx.GraphModule
    called: CalledLayer[Layer]
    grid: Grid
    granularity: Granularity
    moments: Moments | None
    sequential: SequentialRounding | None

    def operate(self) -> dict[str, Any]:
        """Put it in."""
        rounded = None
        if self.sequential is not None:
            rounded = self.sequential.round(self.called, self.grid, self.granularity)
        rounded = rounded or self._alone()
        if self.sequential is not None:
            self.sequential.put(self.called, rounded.weight, rounded.bias)
        write_layer(self.gm, self.called, rounded.weight, rounded.bias)
        return {"weight_error": rounded.weight.error, **rounded.detail}

    def _alone(self) -> Rounded:
        """Without regard to other layers."""
        layer, moments = self.called.layer, self.moments
        weighting = None
        if moments is not None and self.sequential is not None:
            weighting = moments.weighting(centred=layer.bias is not None, shrinkage=0.0)
        weight = weight_as_integers(layer, self.grid, self.granularity, weighting)
        bias = None if layer.bias is None else layer.bias.detach()
        if moments is not None and bias is not None:
            missing = missing_rows(layer, weight).reshape(len(moments.mean), -1, moments.mean.shape[1])
            change = (missing @ moments.mean[:, :, None]).flatten()
            bias = (bias.double() + change.to(bias.device)).to(bias.dtype)
        return Rounded(weight, bias, {"rounding": "nearest" if weighting is None else "adaptive"})
