"""Quantise layers: integer weights, and integer activations between the layers (APPROXIMATE).

The graph that comes out is a *reference*: every layer computes in real numbers, on weights and inputs that were
rounded to integers and back by ``quantized_decomposed`` nodes, with weights really stored as int8. It runs anywhere;
``lower-int8`` or ``torch.compile`` turn it into integer kernels. What is rounded where is decided in ``placement.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from fxcompress import matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.moments import Moments, MomentsObserver
from fxcompress.analysis.patches import READABLE
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.layers import LAYERS, CalledLayer, Layer, called_layers
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Guarantee, Need, Observation, Pass, PassContext, Refusal, Site
from fxcompress.passes.quantization.embeddings import EmbeddingRounding, obstacle_to_embedding
from fxcompress.passes.quantization.emission import write_layer
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.observers import OBSERVERS, RangeObserver, Seen
from fxcompress.passes.quantization.placement import Placement, Value, is_carrier, place, sources_of
from fxcompress.passes.quantization.sequential import Rounded, SequentialRounding, has_moments
from fxcompress.passes.quantization.vocabulary import (
    REAL_DTYPES,
    PerTensor,
    insert_dequantize,
    insert_dynamic_pair,
    insert_quantize,
    is_weight_dequantize,
)
from fxcompress.passes.quantization.weights import Granularity, missing_rows, weight_as_integers

__all__ = ["Quantize"]


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Round weights and activations to integers.

    Fold batch norms before (``["fold-batch-norm", "quantize"]``): one that is left is computed in real numbers. Tables
    of embeddings become integers of 8 bits, a scale for each row, unless ``overrides`` say otherwise.

    Args:
        weight_bits: 2 to 8; stored as int8.
        activation_bits: 8 or 16; ``None`` leaves activations real, so that only the weights shrink.
        dynamic: choose the scales of activations anew in each run, from the values at hand, instead of from
            calibration data.
        granularity: of the scales of weights: one for the whole ``"tensor"``, for each output ``"channel"``, or for
            so many inputs of a channel.
        symmetric: activations as signed integers around a zero point of 0 instead of unsigned ones around any.
        observer: how ranges of activations follow from calibration data: ``"min-max"``, ``"moving-average"``,
            ``"percentile"``, ``"mse"`` or ``"entropy"``; see ``observers.py``.
        rounding: of weights: to the ``"nearest"`` integers, or ``"adaptive"``, so that the layer's output changes least
            on the calibration data, which pays below 8 bits; see ``rounding.py``.
        correct_bias: where there is calibration data, let biases take up what the rounding of weights changes in the
            mean (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
        keep_ends: leave the first and the last layer as they are.
        overrides: for layers by glob pattern of their paths other ``weight_bits``, ``activation_bits`` or
            ``granularity``; of several patterns that match, later ones win.
        exclude: glob patterns of paths of layers, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers; others stay as they are.

    There is a site for each layer (detail: ``module``, ``weight_bits``, ``activation_bits``, ``granularity``,
    ``weight_error`` relative to the norm of the weight) and for each value that is rounded (``value``, ``bits``,
    and unless it is dynamic ``scale``, ``zero_point``).
    """

    name: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    trainable: ClassVar[bool] = False

    weight_bits: int = 8
    activation_bits: int | None = 8
    dynamic: bool = False
    granularity: Granularity = "channel"
    symmetric: bool = False
    observer: str = "mse"
    rounding: Literal["nearest", "adaptive"] = "nearest"
    correct_bias: bool = True
    keep_ends: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_settings(self.weight_bits, self.activation_bits, self.granularity)
        if self.observer not in OBSERVERS:
            near = difflib.get_close_matches(self.observer, OBSERVERS, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"there is no observer {self.observer!r}; did you mean {near!r}? There are {', '.join(OBSERVERS)}"
            )
        if self.rounding not in ("nearest", "adaptive"):
            raise UsageError(f"rounding is 'nearest' or 'adaptive', got {self.rounding!r}")
        if self.dynamic and self.activation_bits is None:
            raise UsageError("dynamic is about activations, and activation_bits=None leaves them real; drop one")
        check_patterns(exclude=self.exclude, only=self.only)
        for pattern, settings in self.overrides.items():
            if unknown := set(settings) - {"weight_bits", "activation_bits", "granularity"}:
                raise UsageError(f"overrides[{pattern!r}] may set weight_bits, activation_bits, granularity; {unknown}")
            self._settings([pattern])

    # ------------------------------------------------------------------------------------------------- the contract
    def calibration_reads(self) -> int:
        """See :meth:`Pass.calibration_reads`."""
        return 2 if self.rounding == "adaptive" else 1

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        if context.gm.training:
            raise PreconditionError(f"{self.name}: the model is in training mode; call model.eval() before")
        if context.batches is not None:
            return
        if self._is_static:
            raise PreconditionError(
                f"{self.name}: the scales of activations come from data; pass `calibration`, some ten batches like "
                "those of use, or use dynamic=True or activation_bits=None"
            )
        if self.rounding == "adaptive":
            raise PreconditionError(f"{self.name}: adaptive rounding looks at data; pass `calibration`")

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        if context.batches is None:
            return
        found = _Found.of(self, context)
        for called in found.layers:
            layer = called.layer
            if isinstance(layer, READABLE) and self._looks_at_inputs(called):
                factory = partial(MomentsObserver, layer, second=self.rounding == "adaptive")
                for source in called.sources:
                    yield Observation(source, _inputs_of(called), factory)
        if not self._is_static:
            return
        for number, group in enumerate(found.placement.sharing()):
            shared = RangeObserver(self.observer)
            members = {value.node for value in group}
            for value in group:
                sources = sources_of(value.node) if is_carrier(context, value.node) else []
                if not sources or not members.issuperset(sources):  # else it has nothing that these have not
                    yield Observation(value.node, _key(number), lambda shared=shared: shared)  # type: ignore[misc]

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: values first, then layers."""
        found = _Found.of(self, context)
        for number, group in enumerate(found.placement.sharing()):
            grid = self._grid(found, group)
            by = None if self.dynamic else self._scale(context, grid, number, group)
            for value in group:
                data = _Rounding(context.gm, value, by, grid, context.shapes.dtype(value.node))
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
            bits = self._settings(table.paths, embedding=True)["weight_bits"]
            rounding = EmbeddingRounding(context.gm, table, Grid.of_weights(bits))
            yield Site(table.calls[0], rounding, {"module": table.path, "weight_bits": bits})
        yield from found.refusals

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """See :meth:`Pass.rewrite`."""
        said: Mapping[str, Any] | None = site.data.operate()
        return said

    # ------------------------------------------------------------------------------------------------- options
    @property
    def _is_static(self) -> bool:
        return self.activation_bits is not None and not self.dynamic

    def _settings(self, paths: Iterable[str], *, embedding: bool = False) -> dict[str, Any]:
        """What holds for the layer, or table of embeddings, at ``paths``."""
        found = {
            "weight_bits": 8 if embedding else self.weight_bits,
            "activation_bits": self.activation_bits,
            "granularity": self.granularity,
        }
        paths = list(paths)
        for pattern, settings in self.overrides.items():
            if any(matching.matches_path(path, pattern) for path in paths):
                found.update(settings)
        _check_settings(**found)
        return found

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

    def _grid(self, found: _Found, group: Iterable[Value]) -> Grid:
        readers = {reader for value in group for reader in value.readers}
        bits = [found.settings[c.path]["activation_bits"] for c in found.layers if readers.intersection(c.calls)]
        return Grid.of_activations(max((b for b in bits if b), default=self.activation_bits or 8), self.symmetric)

    def _scale(self, context: PassContext, grid: Grid, number: int, group: tuple[Value, ...]) -> PerTensor:
        results = (context.statistics.get((value.node, _key(number))) for value in group)
        seen: Seen = next(r for r in results if r is not None)
        where = matching.describe(context.gm, group[0].node)
        if not seen.finite:
            raise PreconditionError(
                f"{self.name}: what {where} gives on the calibration data is not finite; repair the data or the "
                "weights before it, or exclude the layers that read it"
            )
        least, greatest = (torch.tensor(v, dtype=torch.float64) for v in seen.range(grid))
        scale, zero_point = grid.scales(least, greatest)
        return PerTensor(float(scale), int(zero_point), grid)


def _key(number: int) -> str:
    return f"range {number}"


def _inputs_of(called: CalledLayer[Layer]) -> str:
    return f"inputs of {called.path}"


def _check_settings(weight_bits: Any, activation_bits: Any, granularity: Any) -> None:
    if weight_bits not in range(2, 9):
        raise UsageError(f"weight_bits is 2 to 8, got {weight_bits!r}")
    if activation_bits not in (8, 16, None):
        raise UsageError(f"activation_bits is 8, 16 or None, got {activation_bits!r}")
    sized = isinstance(granularity, int) and not isinstance(granularity, bool) and granularity > 1
    if granularity not in ("tensor", "channel") and not sized:
        raise UsageError(f"granularity is 'tensor', 'channel' or a number of inputs above 1, got {granularity!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """The layers and tables to quantise, the settings of layers by path, the values to round, and what is refused."""

    layers: list[CalledLayer[Layer]]
    embeddings: list[CalledLayer[nn.Embedding]]
    settings: Mapping[str, Mapping[str, Any]]
    placement: Placement
    refusals: list[Refusal]

    @classmethod
    def of(cls, pass_: Quantize, context: PassContext) -> _Found:
        found, refused = called_layers(context, LAYERS)
        tables, refused_tables = called_layers(context, (nn.Embedding,))
        refused_tables = [r for r in refused_tables if r[1]]  # calls of functions were among the others
        known = {path for c in found for path in c.paths} | {path for c in tables for path in c.paths}
        known |= {path for _, paths in (*refused, *refused_tables) for path in paths}
        check_patterns_match((*pass_.exclude, *pass_.only, *pass_.overrides), known)
        layers: list[CalledLayer[Any]] = []
        refusals = [_clearer(refusal) for refusal, _ in (*refused, *refused_tables)]
        memory = Memory(context.gm, lambda node: isinstance(context.shapes[node], TensorSpec))
        for called in found[1:-1] if pass_.keep_ends else found:
            if not called.is_wanted(pass_.exclude, pass_.only):
                continue
            if obstacle := _obstacle(called, context, memory):
                refusals.append(Refusal(called.calls[0], obstacle))
            else:
                layers.append(called)
        embeddings = []
        for table in tables:
            if table.is_wanted(pass_.exclude, pass_.only):
                if obstacle := obstacle_to_embedding(table):
                    refusals.append(Refusal(table.calls[0], obstacle))
                else:
                    embeddings.append(table)
        refusals += _unfolded(context, layers)
        if not layers and any(r.reason == _QUANTISED for r in refusals):
            raise PreconditionError(f"{pass_.name}: the model is quantised already; give the one before that")
        settings = {c.path: pass_._settings(c.paths) for c in layers}
        calls = {call for c in layers if settings[c.path]["activation_bits"] for call in c.calls}
        if pass_.activation_bits is None and not calls:
            return cls(layers, embeddings, settings, Placement(()), refusals)
        chains = (lambda node: False) if pass_.dynamic else calls.__contains__
        return cls(layers, embeddings, settings, place(context, calls.__contains__, chains), refusals)


_QUANTISED = "has integer weights already"


def _clearer(refusal: Refusal) -> Refusal:
    if any(is_weight_dequantize(n) for n in refusal.node.all_input_nodes):
        return Refusal(refusal.node, _QUANTISED)
    return refusal


def _unfolded(context: PassContext, layers: Iterable[CalledLayer[Any]]) -> Iterator[Refusal]:
    """Batch norms that follow a layer directly: they could have been folded into it."""
    for user in dict.fromkeys(user for called in layers for call in called.calls for user in call.users):
        if isinstance(context.module(user), nn.modules.batchnorm._BatchNorm):
            yield Refusal(user, "is computed in real numbers behind a layer of integers; put fold-batch-norm before")


def _obstacle(called: CalledLayer[Any], context: PassContext, memory: Memory) -> str | None:
    weight = called.layer.weight
    if weight.dtype not in REAL_DTYPES:
        return f"its weight is {weight.dtype}, and the operators take float32, float16 and bfloat16; use model.float()"
    if not bool(torch.isfinite(weight).all()):
        raise PreconditionError(f"the weight of {called.path!r} is not finite; repair it or exclude the layer")
    if len(called.unwritten_sources(memory)) < len(called.calls):
        return "what it reads is written to in place before it does"
    if any(source.op == "get_attr" for source in called.sources):
        return "reads a constant"
    if any(context.shapes.dtype(source) not in REAL_DTYPES for source in called.sources):
        return "reads another dtype than float32, float16 or bfloat16"
    return None


# ------------------------------------------------------------------------------------------------- what is done
@dataclasses.dataclass(frozen=True, eq=False)
class _Rounding:
    """A value to be rounded to a scale; to one of its own in each run where there is none."""

    gm: fx.GraphModule
    value: Value
    by: PerTensor | None
    grid: Grid
    dtype: torch.dtype

    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = {"value": self.value.node.name, "bits": self.grid.high.bit_length()}
        if self.grid.is_signed:
            found["bits"] += 1
        if self.by is not None:
            found |= {"scale": self.by.scale, "zero_point": self.by.zero_point}
        return found

    def operate(self) -> None:
        node = self.value.node
        with self.gm.graph.inserting_before(_last_input(node).next):
            if self.by is None:
                rounded = insert_dynamic_pair(node, self.grid, self.dtype)
            else:
                rounded = insert_dequantize(insert_quantize(node, self.by), self.by, self.dtype)
        for reader in self.value.readers:
            reader.replace_input_with(node, rounded)


def _last_input(node: fx.Node) -> fx.Node:
    """``node``, or the last input of the graph if it is one: inputs come first."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


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
        if self.sequential is not None:
            self.sequential.start()
        rounded = None
        if self.sequential is not None and self.sequential.takes(self.called):
            rounded = self.sequential.round(self.called, self.grid, self.granularity)
        rounded = self._alone() if rounded is None else rounded
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
