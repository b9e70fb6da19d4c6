"""Replace convolutions and linear layers by pairs of smaller ones, ranks chosen for all layers together (RETRAIN).

ALDS (Liebenwein, Maalouf, Gal, Feldman & Rus 2021, arXiv 2107.11442) slices the input channels of each layer, takes a
truncated singular value decomposition of every slice, and chooses number of slices and rank of all layers so that the
largest relative error is least under a budget. What a pair looks like is in ``folding.py``, the error measures are in
``errors.py``, the choice, which is exact here, is in ``allocate.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from fxcompress.analysis.cost import cost
from fxcompress.analysis.latency import latency
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.moments import Moments
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.calibration import check_batch
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Guarantee, Knob, Need, Observation, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.low_rank.allocate import Options, Unreachable, constant_ratio, least_maximum, least_sum
from fxcompress.passes.low_rank.errors import ERRORS, Activation, ErrorMeasure
from fxcompress.passes.low_rank.folding import SCHEMES, Folding
from fxcompress.passes.low_rank.layers import Candidate, Replacement, Survey
from fxcompress.passes.low_rank.moments import few_rows, observer_of, unobservable, weighting_of
from fxcompress.passes.low_rank.sensitivity import MIDDLING, sensitivities
from fxcompress.passes.low_rank.tables import Table, table_of
from fxcompress.passes.low_rank.timing import seconds_of, worth_timing
from fxcompress.reporting import CURVE

__all__ = ["Alds", "AldsPlus"]

_SOLVERS = {"minimax": least_maximum, "sum": least_sum, "constant": constant_ratio}
_MEASURES = {"params": "parameters", "macs": "MACs", "latency": "latency"}
_RATIOS = (0.2, 0.4, 0.6)
"""What a search tries for each layer."""

_FASTER = 0.97
"""A pair that takes more than this part of the layer's time is not worth it."""


@dataclasses.dataclass(frozen=True)
class Alds(Pass):
    """Decompose layers until a part of the whole model is gone.

    ``Alds(error="operator", solver="minimax")`` is the published method.

    Args:
        ratio: the fraction to remove, in (0, 1), of what ``measure`` says.
        measure: the whole model's ``"params"``, ``"macs"`` or ``"latency"``: the time of one run on the example inputs
            on this machine, eager, as it is measured for layers and pairs one by one. A layer stays whole where no
            pair is faster.
        error: an :class:`~fxcompress.passes.low_rank.errors.ErrorMeasure` or the name of one: ``"operator"``,
            ``"bound"``, ``"residual"``, ``"frobenius"``, ``"noise"``, or ``"activation"``, which needs calibration
            data and with data like those of use is by far the best.
        solver: ``"minimax"`` (the largest error least), ``"sum"`` (the sum of squared errors least) or ``"constant"``
            (the same ratio for every layer).
        schemes: how kernels may be folded, some of 0, 1, 2, 3.
        slices: if given, the only number of slices that is tried.
        max_slices: if given, no more slices than that.
        sensitivity: weigh the errors of each layer by how much the output changes with them, found with one run a layer
            on the first batch of the calibration data (the example inputs, if there are none).
        exclude: glob patterns of paths of layers, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers; others stay as they are.
        per_layer: glob pattern -> the fraction to remove of each of these layers, of its MACs if ``measure`` is
            ``"macs"`` and else of its parameters, by the pair with the least error (a layer without so small a pair
            stays whole). If given, all other layers stay as they are, and ``ratio`` and ``solver`` decide nothing.

    Detail of a site, one for each layer that could be decomposed: ``module``, ``scheme``, ``slices``, ``rank`` (None
    where it stays whole, with ``left_whole`` saying why), ``parameters_before`` and ``parameters_after`` of its
    weights, and ``error``.
    """

    name: ClassVar[str] = "alds"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    stage: ClassVar[Stage] = Stage.FACTORISE

    ratio: float = 0.5
    measure: Literal["params", "macs", "latency"] = "params"
    error: str | ErrorMeasure = "frobenius"
    solver: Literal["minimax", "sum", "constant"] = "sum"
    schemes: tuple[int, ...] = (0,)
    slices: int | None = None
    max_slices: int | None = None
    sensitivity: bool = False
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    per_layer: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"ratio is the fraction to remove, above 0 and below 1, got {self.ratio}")
        for pattern, ratio in self.per_layer.items():
            if not 0 <= ratio < 1:
                raise UsageError(f"per_layer[{pattern!r}] is a fraction to remove, at least 0 and below 1, got {ratio}")
        for option, chosen, known in (
            ("measure", self.measure, tuple(_MEASURES)),
            ("solver", self.solver, tuple(_SOLVERS)),
        ):
            if chosen not in known:
                raise UsageError(f"{option} must be one of {', '.join(known)}, got {chosen!r}")
        if isinstance(self.error, str) and self.error not in ERRORS:
            near = difflib.get_close_matches(self.error, ERRORS, n=1, cutoff=0.0)[0]
            raise UsageError(f"there is no error {self.error!r}; did you mean {near!r}? There are {', '.join(ERRORS)}")
        if not self.schemes or not set(self.schemes) <= set(SCHEMES):
            raise UsageError(f"schemes are some of 0, 1, 2 and 3, got {self.schemes!r}")
        check_patterns(exclude=self.exclude, only=self.only)
        for option, value in (("slices", self.slices), ("max_slices", self.max_slices)):
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")

    # ------------------------------------------------------------------------------------------------- the contract
    def calibration_reads(self) -> int:
        """See :meth:`Pass.calibration_reads`."""
        return int(self.sensitivity) + int(self._measure_of_error().needs_data)

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`: some errors need calibration data."""
        measure = self._measure_of_error()
        if measure.needs_data and context.batches is None:
            raise PreconditionError(
                f"{self.name}: the error {measure.name!r} is measured on data; pass `calibration`, a few batches"
            )

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        if not self._measure_of_error().needs_data:
            return
        memory = Memory(context.gm, lambda node: isinstance(context.shapes[node], TensorSpec))
        for candidate in filter(self._is_wanted, Survey(context).candidates):
            folding = Folding.of(candidate.layer)
            for scheme in folding.distinct(self.schemes):
                if unobservable(candidate.layer, folding, scheme) is None:
                    for source in candidate.unwritten_sources(memory):
                        observer = partial(observer_of, candidate.layer, scheme)
                        yield Observation(source, _key(candidate, scheme), observer)

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: one site for each layer that could be decomposed, whether it is or not."""
        survey = Survey(context)
        known = {path for c in survey.candidates for path in c.paths} | {str(r.node.target) for r in survey.refusals}
        check_patterns_match((*self.exclude, *self.only, *self.per_layer), known)
        wanted = [c for c in survey.candidates if self._is_wanted(c)]
        moments = [self._moments(context, c) for c in wanted]
        tables = [self._table(context, c, of) for c, of in zip(wanted, moments, strict=True)]
        weights = self._weights(context, wanted, tables, moments) if self.sensitivity else np.ones(len(wanted))
        for i, option in enumerate(self._chosen(context, wanted, tables, weights)):
            replacement = Replacement(wanted[i], tables[i].choice(option), moments[i], self._shrinkage)
            detail = _detail(wanted[i].path, tables[i], option, self._why_whole(tables[i]))
            if self.sensitivity:
                detail["sensitivity"] = float(weights[i])
            yield Site(wanted[i].calls[0], (context.gm, replacement), detail)
        yield from survey.refusals

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        gm, replacement = site.data
        replacement.operate(gm)

    # ------------------------------------------------------------------------------------------------- for a search
    def knobs(self, context: PassContext) -> Iterator[Knob]:
        """See :meth:`Pass.knobs`: a ratio for each layer, if not all its channels are by themselves (depthwise)."""
        for candidate in Survey(context).candidates:
            if self._is_wanted(candidate) and candidate.layer.weight.shape[1] > 1:
                yield Knob(candidate.path, "ratio", _RATIOS)

    def turned(self, settings: Mapping[str, float]) -> Alds:
        """See :meth:`Pass.turned`."""
        return dataclasses.replace(self, per_layer={glob.escape(layer): float(r) for layer, r in settings.items()})

    # ------------------------------------------------------------------------------------------------- options
    def _measure_of_error(self) -> ErrorMeasure:
        return ERRORS[self.error]() if isinstance(self.error, str) else self.error

    @property
    def _shrinkage(self) -> float:
        measure = self._measure_of_error()
        return measure.shrinkage if isinstance(measure, Activation) else 0.0

    def _is_wanted(self, candidate: Candidate) -> bool:
        if self.per_layer and not self._own_ratio(candidate):
            return False
        return candidate.is_wanted(self.exclude, self.only)

    def _own_ratio(self, candidate: Candidate) -> float:
        """What ``per_layer`` says of a layer; 0 if nothing."""
        return next((r for pattern, r in self.per_layer.items() if candidate.matches(pattern)), 0.0)

    # ------------------------------------------------------------------------------------------------- choices
    def _moments(self, context: PassContext, candidate: Candidate) -> dict[int, Moments]:
        """Of the inputs of a layer, for each scheme for which there are any."""
        found = {}
        for scheme in Folding.of(candidate.layer).distinct(self.schemes):
            parts = [context.statistics.get((source, _key(candidate, scheme))) for source in candidate.sources]
            merged = Moments.merged([p for p in parts if p is not None])
            if merged is None:
                continue
            if not merged.is_finite():
                raise PreconditionError(
                    f"{self.name}: what {candidate.path!r} reads on the calibration data is not finite; repair the "
                    "data or the weights before it, or exclude it"
                )
            found[scheme] = merged
        return found

    def _table(self, context: PassContext, candidate: Candidate, moments: Mapping[int, Moments]) -> Table:
        given = {s: weighting_of(found, candidate.layer, self._shrinkage) for s, found in moments.items()}
        weightings = {s: c for s, c in given.items() if c is not None}
        places = candidate.places(context, self.schemes)
        by = "macs" if self.measure == "macs" else "params"
        table = table_of(
            candidate.path,
            candidate.layer,
            places,
            self._measure_of_error(),
            self.schemes,
            self._allows,
            weightings,
            by,
        )
        few = [few_rows(found, scheme) for scheme, found in moments.items() if not found.spans()]
        return dataclasses.replace(table, notes=(*table.notes, *few))

    def _allows(self, slices: int) -> bool:
        if self.slices is not None and slices != self.slices:
            return False
        return self.max_slices is None or slices <= self.max_slices

    def _why_whole(self, table: Table) -> str:
        """What to say if the layer stays as it is."""
        if len(table.rank) == 1:
            return "no pair in an allowed number of slices is smaller"
        if self.measure == "latency":
            return "no pair is faster here, or its part of the budget allows it"
        return "its part of the budget allows it"

    def _weights(
        self,
        context: PassContext,
        wanted: Sequence[Candidate],
        tables: Sequence[Table],
        moments: Sequence[Mapping[int, Moments]],
    ) -> np.ndarray:
        """How much the output changes with the error of each layer."""
        trials: list[tuple[Replacement, float] | None] = []
        for candidate, table, found in zip(wanted, tables, moments, strict=True):
            option = table.nearest(MIDDLING)
            replacement = Replacement(candidate, table.choice(option), found, self._shrinkage)
            trials.append((replacement, float(table.error[option])) if option and table.error[option] else None)
        example = context.example
        if context.batches is not None:
            example = next(iter(context.batches))
            check_batch(context.gm, example, 0)
        assert example is not None, "declared in needs"
        return sensitivities(context.gm, example, trials)

    def _chosen(
        self, context: PassContext, wanted: Sequence[Candidate], tables: Sequence[Table], weights: np.ndarray
    ) -> list[int]:
        """The option of each layer."""
        if self.per_layer:
            return [self._within(table, 1 - self._own_ratio(c)) for c, table in zip(wanted, tables, strict=True)]
        whole, sizes, kept = self._sizes(context, wanted, tables)
        others = whole - sum(float(s[0]) for s in sizes)
        errors = [t.error[k] * w**0.5 for t, k, w in zip(tables, kept, weights, strict=True)]
        layers = [Options(s, e) for s, e in zip(sizes, errors, strict=True)]
        try:
            found = _SOLVERS[self.solver](layers, (1 - self.ratio) * whole - others)
        except Unreachable as error:
            most = 1 - (error.least + others) / whole if whole else 0.0
            raise PreconditionError(
                f"{self.name}: {self.ratio:.1%} of the {_MEASURES[self.measure]} cannot be removed: with every layer "
                f"at its smallest, {max(most, 0.0):.1%} are gone. Lower `ratio`, exclude less, or allow more slices"
            ) from None
        return [int(k[option]) for k, option in zip(kept, found.choice, strict=True)]

    def _within(self, table: Table, part: float) -> int:
        """The option with the least error that has no more than ``part`` of the layer; else 0, the layer as it is."""
        sizes = table.macs if self.measure == "macs" else table.parameters
        fitting = np.flatnonzero(sizes <= part * sizes[0] * (1 + 1e-12))
        return int(fitting[np.argmin(table.error[fitting])]) if len(fitting) else 0

    def _sizes(
        self, context: PassContext, wanted: Sequence[Candidate], tables: Sequence[Table]
    ) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
        """What the whole graph has of what there is a budget of, what the options of each layer have, and which of its
        options these are."""
        assert context.example is not None, "declared in needs"
        args, kwargs = context.example.args, context.example.kwargs
        if self.measure == "latency":
            kept, sizes = [], []
            for candidate, table in zip(wanted, tables, strict=True):
                options = worth_timing(table)
                seconds = seconds_of(
                    candidate.layer, [table.choice(int(o)) for o in options], candidate.inputs(context)
                )
                faster = np.flatnonzero(seconds < _FASTER * seconds[0])
                options, seconds = (np.concatenate([v[:1], v[faster]]) for v in (options, seconds))
                kept.append(options)
                sizes.append(seconds)
            return latency(context.gm, args, kwargs).median, sizes, kept
        found = cost(context.gm, args, kwargs)
        kept = [np.arange(len(t.rank)) for t in tables]
        if self.measure == "params":
            return found.parameters, [t.parameters for t in tables], kept
        return found.macs or 0, [t.macs for t in tables], kept


@dataclasses.dataclass(frozen=True)
class AldsPlus(Alds):
    """:class:`Alds` with all four ways to fold a kernel: ALDS+ in appendix C of the paper."""

    name: ClassVar[str] = "alds-plus"
    schemes: tuple[int, ...] = SCHEMES


def _key(candidate: Candidate, scheme: int) -> str:
    return f"low-rank moments of {candidate.path}, scheme {scheme}"


def _detail(path: str, table: Table, option: int, why_whole: str) -> dict[str, Any]:
    choice = table.choice(option)
    detail: dict[str, Any] = {
        "module": path,
        "scheme": None if choice is None else choice.scheme,
        "slices": None if choice is None else choice.slices,
        "rank": None if choice is None else choice.rank,
        "parameters_before": int(table.parameters[0]),
        "parameters_after": int(table.parameters[option]),
        "error": float(table.error[option]),
    }
    if choice is None:
        detail["left_whole"] = why_whole
    if table.notes:
        detail["notes"] = list(table.notes)
    if len(table.rank) > 1:
        detail[CURVE] = {"knob": "parameters kept, as a fraction of the layer's", "points": table.curve()}
    return detail
