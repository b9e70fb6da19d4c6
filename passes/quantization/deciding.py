"""What a pass that rounds decides: which layers, with how many bits, which values between them, on which scales."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fxcompress import matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.layers import LAYERS, CalledLayer, Layer, called_layers, paths_of
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Observation, Pass, PassContext, Refusal
from fxcompress.passes.quantization.embeddings import obstacle_to_embedding
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.observers import OBSERVERS, RangeObserver, Seen
from fxcompress.passes.quantization.placement import Placement, Value, is_carrier, place, sources_of
from fxcompress.passes.quantization.vocabulary import REAL_DTYPES, PerTensor, is_weight_dequantize
from fxcompress.passes.quantization.weights import Granularity

__all__ = ["Found", "RoundingPass"]


@dataclasses.dataclass(frozen=True)
class RoundingPass(Pass):
    """What ``quantize`` and ``fake-quantize`` have in common.

    Args:
        weight_bits: 2 to 8; stored as int8.
        activation_bits: 8 or 16; ``None`` leaves activations real, so that only the weights shrink.
        granularity: of the scales of weights: one for the whole ``"tensor"``, for each output ``"channel"``, or for
            so many inputs of a channel.
        symmetric: activations as signed integers around a zero point of 0 instead of unsigned ones around any.
        observer: how ranges of activations follow from calibration data: ``"min-max"``, ``"moving-average"``,
            ``"percentile"``, ``"mse"`` or ``"entropy"``; see ``observers.py``.
        keep_ends: leave the first and the last layer as they are.
        round_addends: where a layer's result is added to something, round both before the addition and not only the
            other one: for runtimes that add integers alone (OpenVINO, ONNX Runtime).
        overrides: for layers by glob pattern of their paths other ``weight_bits``, ``activation_bits`` or
            ``granularity``; of several patterns that match, later ones win.
        exclude: glob patterns of paths of layers, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers; others stay as they are.
    """

    without_data: ClassVar[str] = "activation_bits=None"
    """Options with which no scale comes from data."""

    weight_bits: int = 8
    activation_bits: int | None = 8
    granularity: Granularity = "channel"
    symmetric: bool = False
    observer: str = "mse"
    keep_ends: bool = False
    round_addends: bool = False
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
        check_patterns(exclude=self.exclude, only=self.only)
        for pattern, settings in self.overrides.items():
            if unknown := set(settings) - {"weight_bits", "activation_bits", "granularity"}:
                raise UsageError(f"overrides[{pattern!r}] may set weight_bits, activation_bits, granularity; {unknown}")
            self.settings([pattern])

    @property
    def is_static(self) -> bool:
        """Whether the scales of activations come from calibration data."""
        bits = (self.activation_bits, *(settings.get("activation_bits") for settings in self.overrides.values()))
        return any(b is not None for b in bits)

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        self.check_mode(context)
        if context.batches is None and self.is_static:
            raise PreconditionError(
                f"{self.name}: the scales of activations come from data; pass `calibration`, some ten batches like "
                f"those of use, or use {self.without_data}"
            )

    def check_mode(self, context: PassContext) -> None:
        """Refuse a model that is being trained."""
        if context.gm.training:
            raise PreconditionError(f"{self.name}: the model is in training mode; call model.eval() before")

    def settings(self, paths: Iterable[str], *, embedding: bool = False) -> dict[str, Any]:
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

    def ranges(self, context: PassContext, found: Found) -> Iterator[Observation]:
        """What has to be seen of the values; those on one scale share an observer."""
        if not self.is_static:
            return
        for number, group in enumerate(found.placement.sharing()):
            shared = RangeObserver(self.observer)
            members = {value.node for value in group}
            for value in group:
                sources = sources_of(value.node) if is_carrier(context, value.node) else []
                if not sources or not members.issuperset(sources):  # else it has nothing that these have not
                    yield Observation(value.node, _key(number), lambda shared=shared: shared)  # type: ignore[misc]

    def grid(self, found: Found, group: Iterable[Value]) -> Grid:
        """Of values on one scale: as many bits as any layer that reads one of them asks for."""
        readers = {reader for value in group for reader in value.readers}
        bits = [found.settings[c.path]["activation_bits"] for c in found.layers if readers.intersection(c.calls)]
        return Grid.of_activations(max((b for b in bits if b), default=self.activation_bits or 8), self.symmetric)

    def scale(self, context: PassContext, grid: Grid, number: int, group: tuple[Value, ...]) -> PerTensor:
        """Of the values of group ``number``, from what :meth:`ranges` saw of them."""
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


def _check_settings(weight_bits: Any, activation_bits: Any, granularity: Any) -> None:
    if weight_bits not in range(2, 9):
        raise UsageError(f"weight_bits is 2 to 8, got {weight_bits!r}")
    if activation_bits not in (8, 16, None):
        raise UsageError(f"activation_bits is 8, 16 or None, got {activation_bits!r}")
    sized = isinstance(granularity, int) and not isinstance(granularity, bool) and granularity > 1
    if granularity not in ("tensor", "channel") and not sized:
        raise UsageError(f"granularity is 'tensor', 'channel' or a number of inputs above 1, got {granularity!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The layers and tables to quantise, the settings of layers by path, the values to round, and what is refused."""

    layers: list[CalledLayer[Layer]]
    embeddings: list[CalledLayer[nn.Embedding]]
    settings: Mapping[str, Mapping[str, Any]]
    placement: Placement
    refusals: list[Refusal]

    @classmethod
    def of(cls, pass_: RoundingPass, context: PassContext) -> Found:
        """What ``pass_`` finds in the graph."""
        found, refused = called_layers(context, LAYERS)
        tables, refused_tables = called_layers(context, (nn.Embedding,))
        refused_tables = [r for r in refused_tables if r[1]]  # calls of functions were among the others
        known = paths_of(found, refused) | paths_of(tables, refused_tables)
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
        settings = {c.path: pass_.settings(c.paths) for c in layers}
        calls = {call for c in layers if settings[c.path]["activation_bits"] for call in c.calls}
        if pass_.activation_bits is None and not calls:
            return cls(layers, embeddings, settings, Placement(()), refusals)
        chains = calls.__contains__ if pass_.is_static else (lambda node: False)
        placement = place(context, calls.__contains__, chains, round_addends=pass_.round_addends)
        return cls(layers, embeddings, settings, placement, refusals)


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
