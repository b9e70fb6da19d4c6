"""The layers of a graph that a pair could stand for, and putting one in place of a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from fxcompress import editing, matching
from fxcompress.analysis.moments import Moments
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.layers import LAYERS, CalledLayer, Layer, called_layers
from fxcompress.pass_base import PassContext
from fxcompress.passes.low_rank.folding import Choice, Folding, slices_of
from fxcompress.passes.low_rank.moments import given_by_mean, takes_up_mean, weighting_of
from fxcompress.passes.low_rank.spectra import factors
from fxcompress.passes.low_rank.tables import Places, between

__all__ = ["Candidate", "Replacement", "Survey"]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate(CalledLayer[Layer]):
    """A layer and how often its weights are used."""

    def inputs(self, context: PassContext) -> list[TensorSpec]:
        """Shape and dtype of the input of each call."""
        return [context.shapes.spec(source) for source in self.sources]

    def places(self, context: PassContext, schemes: tuple[int, ...]) -> Places:
        """How often the weights are used in one run on the example."""
        space = 0 if isinstance(self.layer, nn.Linear) else len(self.layer.kernel_size)
        entering = leaving = 0
        middle = dict.fromkeys(Folding.of(self.layer).distinct(schemes), 0)
        for call, spec in zip(self.calls, self.inputs(context), strict=True):
            given, made = spec.shape, context.shapes.shape(call)
            others = math.prod(given[: len(given) - space - 1])
            into, out = (given[-space:], made[-space:]) if space else ((), ())
            entering += others * math.prod(into)
            leaving += others * math.prod(out)
            for scheme in middle:
                middle[scheme] += others * between(self.layer, scheme, into, out)
        return Places(entering, leaving, middle, bool(getattr(self.layer, "transposed", False)))


class Survey:
    """The layers of a graph, and what looks like one and is refused."""

    def __init__(self, context: PassContext) -> None:
        found, refused = called_layers(context, LAYERS)
        self.candidates = [Candidate(c.path, c.paths, c.layer, c.calls) for c in found]  # type: ignore[arg-type]
        self.refusals = [refusal for refusal, _ in refused]


@dataclasses.dataclass(frozen=True, eq=False)
class Replacement:
    """What is to become of one layer.

    Attributes:
        candidate: the layer.
        choice: the pair; ``None`` to leave it whole.
        moments: of its inputs, by scheme, where they are known.
        shrinkage: see :meth:`Moments.weighting`.
    """

    candidate: Candidate
    choice: Choice | None
    moments: Mapping[int, Moments]
    shrinkage: float

    def operate(self, gm: fx.GraphModule) -> None:
        """Put the pair in place of the layer, at every call of it; its path then holds ``encoder`` and ``decoder``."""
        if self.choice is None:
            return
        path, layer = self.candidate.path, self.candidate.layer
        holder = nn.Module().train(layer.training)
        left, right, bias = self._factors(self.choice)
        folding = Folding.of(layer)
        holder.encoder, holder.decoder = folding.pair(layer, self.choice.scheme, left, right, bias)
        owner, _, leaf = path.rpartition(".")
        setattr(gm.get_submodule(owner), leaf, holder)
        for call in self.candidate.calls:
            source = matching.tensor_input(call)  # which may be an earlier call of this very layer
            with gm.graph.inserting_before(call):
                inner = gm.graph.call_module(f"{path}.encoder", (source,))
                outer = gm.graph.call_module(f"{path}.decoder", (inner,))
            editing.replace(call, outer)

    def stand_in(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias with which the layer would give what the pair gives."""
        assert self.choice is not None, "a pair to stand for"
        left, right, bias = self._factors(self.choice)
        layer = self.candidate.layer
        return Folding.of(layer).weight_of(layer, self.choice.scheme, left @ right), bias

    def _factors(self, c: Choice) -> tuple[Tensor, Tensor, Tensor | None]:
        layer, found = self.candidate.layer, self.moments.get(c.scheme)
        folding = Folding.of(layer)
        whole = None if found is None else weighting_of(found, layer, self.shrinkage)
        weighting = None if whole is None else slices_of(whole, c.slices)
        left, right = factors(layer, folding, c.scheme, c.slices, c.rank, weighting)
        bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
        if found is not None and bias is not None and takes_up_mean(layer):
            missing = folding.matrices(layer, c.scheme, c.slices) - left @ right
            bias = bias.to("cpu", torch.float64) + given_by_mean(found, folding, missing)
        return left, right, bias
