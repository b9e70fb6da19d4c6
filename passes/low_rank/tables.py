"""The options of each layer: every scheme, number of slices and rank that pays, with its size and its error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import PreconditionError
from fxcompress.layers import Layer
from fxcompress.passes.low_rank.errors import ErrorMeasure, Scale
from fxcompress.passes.low_rank.folding import Choice, Folding
from fxcompress.passes.low_rank.moments import unobservable
from fxcompress.passes.low_rank.spectra import spectra

__all__ = ["Places", "Table", "between", "table_of"]


@dataclasses.dataclass(frozen=True)
class Places:
    """How often a layer's weights are used in one run, all calls together.

    Attributes:
        entering: samples times places of its input.
        leaving: the same of its output.
        between: for each scheme the same of what the encoder gives.
        transposed: whether weights are used once for each place of the input, not of the output.
    """

    entering: int
    leaving: int
    between: Mapping[int, int]
    transposed: bool

    @property
    def whole(self) -> int:
        """How often each weight of the layer is used."""
        return self.entering if self.transposed else self.leaving

    def encoder(self, scheme: int) -> int:
        """How often each weight of the encoder is used."""
        return self.entering if self.transposed else self.between[scheme]

    def decoder(self, scheme: int) -> int:
        """How often each weight of the decoder is used."""
        return self.between[scheme] if self.transposed else self.leaving


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The options of one layer. Option 0 is the layer as it is.

    Attributes:
        scheme, slices, rank: of each option; 0 for option 0.
        parameters: weights of each option.
        macs: multiply-accumulates of each option.
        error: of each option.
        notes: what the user should know.
    """

    scheme: np.ndarray
    slices: np.ndarray
    rank: np.ndarray
    parameters: np.ndarray
    macs: np.ndarray
    error: np.ndarray
    notes: tuple[str, ...] = ()

    def curve(self, most: int = 16) -> list[tuple[float, float]]:
        """The fraction of the parameters kept and the least error that it, or less, can have; at ``most`` points."""
        order = np.lexsort((self.error, self.parameters))
        least = np.minimum.accumulate(self.error[order])
        better = np.flatnonzero(np.diff(least, prepend=np.inf) < 0)
        places = better[np.unique(np.linspace(0, len(better) - 1, most).round().astype(int))]
        kept = self.parameters[order][places] / self.parameters[0]
        return [(float(x), float(y)) for x, y in zip(kept, least[places], strict=True)]

    def nearest(self, error: float) -> int:
        """The option in fewest slices whose error is nearest to ``error``; 0 if there is none."""
        if len(self.rank) == 1:
            return 0
        fewest = np.flatnonzero(self.slices == self.slices[1:].min())
        return int(fewest[np.argmin(np.abs(self.error[fewest] - error))])

    def choice(self, option: int) -> Choice | None:
        """What an option is; ``None`` for the layer as it is."""
        if option == 0:
            return None
        return Choice(int(self.scheme[option]), int(self.slices[option]), int(self.rank[option]))


_Part = tuple[int, int, np.ndarray, np.ndarray]
"""Scheme, slices, ranks, and the error at each."""


def table_of(
    path: str,
    layer: Layer,
    places: Places,
    measure: ErrorMeasure,
    schemes: Sequence[int],
    slices: Callable[[int], bool],
    weightings: Mapping[int, Tensor],
    by: str,
) -> Table:
    """The options of ``layer``, which is at ``path``.

    Args:
        path: for messages.
        layer: the layer.
        places: how often it is used.
        measure: of errors.
        schemes: those allowed.
        slices: whether a number of slices is allowed.
        weightings: for each scheme ``C`` of the inputs, where it is known.
        by: ``"params"`` or ``"macs"``: only options with fewer of these count.

    Raises:
        PreconditionError: its weights are not finite.
    """
    if not bool(torch.isfinite(layer.weight).all()):
        raise PreconditionError(f"the weight of {path!r} is not finite, so it has no singular values; repair it")
    folding = Folding.of(layer)
    parts: list[_Part] = [(0, 0, np.zeros(1, dtype=np.int64), np.zeros(1))]
    notes = []
    for scheme in folding.distinct(tuple(schemes)):
        weighting = weightings.get(scheme)
        if measure.needs_data and weighting is None:
            unseen = "calibration never reaches it, or does not vary there, or it is overwritten before"
            reason = unobservable(layer, folding, scheme) or unseen
            notes.append(f"scheme {scheme}: plain error instead of {measure.name!r}, {reason}")
        paying = {k: _paying(folding, places, scheme, k, by) for k in folding.all_slices() if slices(k)}
        paying = {k: ranks for k, ranks in paying.items() if len(ranks)}
        if not paying:
            continue
        scale = None
        for spectral in spectra(layer, folding, scheme, [1, *(k for k in paying if k > 1)], weighting):
            scale = scale or Scale.of(spectral)
            k = spectral.slices
            ranks = paying.get(k, np.zeros(0, dtype=np.int64))
            ranks = ranks[ranks <= spectral.rank]
            if measure.ranks is not None and k > 1 and len(ranks) > measure.ranks:
                ranks = np.unique(np.linspace(ranks[0], ranks[-1], measure.ranks).round().astype(np.int64))
            if len(ranks):
                parts.append((scheme, k, ranks, measure.curve(layer, folding, spectral, ranks, scale)))
    return _assembled(folding, places, parts, tuple(notes))


def _per_rank(folding: Folding, places: Places, scheme: int, slices: int) -> tuple[int, int]:
    encoder, decoder = folding.weights_per_rank(scheme, slices)
    return encoder + decoder, encoder * places.encoder(scheme) + decoder * places.decoder(scheme)


def _paying(folding: Folding, places: Places, scheme: int, slices: int, by: str) -> np.ndarray:
    """The ranks with which a pair is smaller than the layer."""
    parameters, macs = _per_rank(folding, places, scheme, slices)
    most = (folding.size - 1) // parameters
    if by == "macs":
        most = (folding.size * places.whole - 1) // max(macs, 1)
    return np.arange(1, most + 1)


def _assembled(folding: Folding, places: Places, parts: Sequence[_Part], notes: tuple[str, ...]) -> Table:
    columns: dict[str, list[np.ndarray]] = {k: [] for k in ("scheme", "slices", "parameters", "macs")}
    for scheme, k, ranks, _ in parts:
        parameters, macs = (
            (folding.size, folding.size * places.whole) if k == 0 else _per_rank(folding, places, scheme, k)
        )
        times = np.ones_like(ranks) if k == 0 else ranks
        for name, value in (("scheme", scheme), ("slices", k)):
            columns[name].append(np.full(len(ranks), value))
        columns["parameters"].append(parameters * times)
        columns["macs"].append(macs * times)
    return Table(
        rank=np.concatenate([ranks for _, _, ranks, _ in parts]),
        error=np.concatenate([error for *_, error in parts]),
        notes=notes,
        **{name: np.concatenate(values) for name, values in columns.items()},
    )


def between(layer: Layer, scheme: int, entering: Sequence[int], leaving: Sequence[int]) -> int:
    """Places of what the encoder gives, from the sizes in space of the layer's input and output."""
    by_decoder = Folding.of(layer).by_decoder(scheme)
    return math.prod(i if d else o for i, o, d in zip(entering, leaving, by_decoder, strict=True))
