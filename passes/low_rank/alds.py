"""Replace convolutions and linear layers by pairs of smaller ones, ranks chosen for all layers together (RETRAIN).

ALDS (Liebenwein, Maalouf, Gal, Feldman & Rus 2021, arXiv 2107.11442) slices the input channels of each layer, takes a
truncated singular value decomposition of every slice, and chooses number of slices and rank of all layers so that the
largest relative error is least under a budget. What a pair looks like is in ``folding.py``, the error measures are in
``errors.py``, the choice, which is exact here, is in ``allocate.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.analysis.cost import cost
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import matches_path
from fxcompress.pass_base import Guarantee, Need, Observation, Pass, PassContext, Refusal, Site
from fxcompress.passes.low_rank.allocate import (
    Allocation,
    Options,
    Unreachable,
    constant_ratio,
    least_maximum,
    least_sum,
)
from fxcompress.passes.low_rank.errors import ERRORS, ErrorMeasure
from fxcompress.passes.low_rank.folding import LAYERS, SCHEMES, Choice, Folding, Layer
from fxcompress.passes.low_rank.moments import Moments, MomentsObserver, observable, slices_of
from fxcompress.passes.low_rank.spectra import factors
from fxcompress.passes.low_rank.tables import Places, Table, between, corrected_bias, table_of

__all__ = ["Alds", "AldsPlus"]

_SOLVERS = {"minimax": least_maximum, "sum": least_sum, "constant": constant_ratio}
_MEASURES = {"params": "parameters", "macs": "MACs"}


@dataclasses.dataclass(frozen=True)
class Alds(Pass):
    """Decompose layers until a part of the whole model is gone.

    ``Alds(error="operator", solver="minimax")`` is the published method.

    Args:
        ratio: the fraction to remove, in (0, 1), of the whole model's parameters or MACs.
        measure: ``"params"`` or ``"macs"``.
        error: an :class:`~fxcompress.passes.low_rank.errors.ErrorMeasure` or the name of one: ``"operator"``,
            ``"bound"``, ``"residual"``, ``"frobenius"`` or ``"activation"``, which needs calibration data.
        solver: ``"minimax"`` (the largest error least), ``"sum"`` (the sum of squared errors least) or ``"constant"``
            (the same ratio for every layer).
        schemes: how kernels may be folded, some of 0, 1, 2, 3.
        slices: if given, the only number of slices that is tried.
        max_slices: if given, no more slices than that.
        exclude: glob patterns of paths of layers, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers; others stay as they are.

    Detail of a site, one for each layer that could be decomposed: ``module``, ``scheme``, ``slices``, ``rank`` (None
    where it stays whole, with ``left_whole`` saying why), ``parameters_before`` and ``parameters_after`` of its
    weights, and ``error``.
    """

    name: ClassVar[str] = "alds"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})

    ratio: float = 0.5
    measure: Literal["params", "macs"] = "params"
    error: str | ErrorMeasure = "frobenius"
    solver: Literal["minimax", "sum", "constant"] = "sum"
    schemes: tuple[int, ...] = (0,)
    slices: int | None = None
    max_slices: int | None = None
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"ratio is the fraction to remove, above 0 and below 1, got {self.ratio}")
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
        for option, value in (("slices", self.slices), ("max_slices", self.max_slices)):
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")

    # ------------------------------------------------------------------------------------------------- the contract
    def reads_calibration(self) -> bool:
        """See :meth:`Pass.reads_calibration`."""
        return self._error().needs_data

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`: some errors need calibration data."""
        if self._error().needs_data and context.batches is None:
            raise PreconditionError(
                f"{self.name}: the error {self._error().name!r} is measured on data; pass `calibration`, a few batches"
            )

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        if not self._error().needs_data:
            return
        for path, (layer, calls) in _Survey(context).layers.items():
            folding = Folding.of(layer)
            for scheme in folding.distinct(self.schemes):
                if self._is_wanted(path) and observable(layer, folding, scheme):
                    for call in calls:
                        source = matching.tensor_input(call)
                        assert source is not None, "the survey admits only calls with one tensor"
                        yield Observation(source, _key(path, scheme), partial(MomentsObserver, layer, scheme))

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: one site for each layer that could be decomposed, whether it is or not."""
        survey = _Survey(context)
        self._check_patterns(survey)
        moments = {path: self._moments(context, path, *of) for path, of in survey.layers.items()}
        tables = {
            path: self._table(context, path, layer, calls, moments[path])
            for path, (layer, calls) in survey.layers.items()
            if self._is_wanted(path)
        }
        allocation = self._allocated(context, survey, tables)
        for (path, table), option in zip(tables.items(), allocation.choice, strict=True):
            layer, calls = survey.layers[path]
            work = _Work(context.gm, path, layer, calls, table.choice(option), moments[path])
            yield Site(calls[0], work, _detail(path, table, option))
        yield from survey.refusals

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """See :meth:`Pass.rewrite`."""
        work: _Work = site.data
        return work.operate()

    # ------------------------------------------------------------------------------------------------- choices
    def _error(self) -> ErrorMeasure:
        return ERRORS[self.error]() if isinstance(self.error, str) else self.error

    def _is_wanted(self, path: str) -> bool:
        if any(matches_path(path, pattern) for pattern in self.exclude):
            return False
        return not self.only or any(matches_path(path, pattern) for pattern in self.only)

    def _check_patterns(self, survey: _Survey) -> None:
        known = [*survey.layers, *(str(r.node.target) for r in survey.refusals)]
        for pattern in (*self.exclude, *self.only):
            if not any(matches_path(path, pattern) for path in known):
                near = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.0)
                raise UsageError(f"no path of a layer matches {pattern!r}; near it: {', '.join(near)}")

    def _moments(self, context: PassContext, path: str, layer: Layer, calls: list[fx.Node]) -> dict[int, Moments]:
        found = {}
        for scheme in Folding.of(layer).distinct(self.schemes):
            sources = [matching.tensor_input(call) for call in calls]
            parts = [context.statistics.get((s, _key(path, scheme))) for s in sources if s is not None]
            if kept := [p for p in parts if p is not None]:
                found[scheme] = Moments.merged(kept)
        return found

    def _table(
        self, context: PassContext, path: str, layer: Layer, calls: list[fx.Node], moments: Mapping[int, Moments]
    ) -> Table:
        return table_of(
            path, layer, _places(context, layer, calls, self.schemes), self._error(), self.schemes,
            self._allows, moments, self.measure,
        )  # fmt: skip

    def _allows(self, slices: int) -> bool:
        if self.slices is not None and slices != self.slices:
            return False
        return self.max_slices is None or slices <= self.max_slices

    def _allocated(self, context: PassContext, survey: _Survey, tables: Mapping[str, Table]) -> Allocation:
        assert context.example is not None, "declared in needs"
        found = cost(context.gm, context.example.args, context.example.kwargs)
        sizes = [t.parameters if self.measure == "params" else t.macs for t in tables.values()]
        whole = found.parameters if self.measure == "params" else found.macs or 0
        budget = (1 - self.ratio) * whole - (whole - sum(int(s[0]) for s in sizes))
        layers = [t.options(s) for t, s in zip(tables.values(), sizes, strict=True)]
        try:
            return _SOLVERS[self.solver](layers, budget)
        except Unreachable as error:
            most = 1 - (error.least + whole - sum(int(s[0]) for s in sizes)) / whole if whole else 0.0
            raise PreconditionError(
                f"{self.name}: {self.ratio:.1%} of the {_MEASURES[self.measure]} cannot be removed: with every layer at "
                f"its smallest, {max(most, 0.0):.1%} are gone. Lower `ratio`, exclude less, or allow more slices"
            ) from None


@dataclasses.dataclass(frozen=True)
class AldsPlus(Alds):
    """:class:`Alds` with all four ways to fold a kernel: ALDS+ in appendix C of the paper."""

    name: ClassVar[str] = "alds-plus"
    schemes: tuple[int, ...] = SCHEMES


# ------------------------------------------------------------------------------------------------- the graph
def _key(path: str, scheme: int) -> str:
    return f"low-rank moments of {path}, scheme {scheme}"


def _detail(path: str, table: Table, option: int) -> dict[str, Any]:
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
        detail["left_whole"] = "its part of the budget allows it" if len(table.rank) > 1 else "no pair is smaller"
    if table.notes:
        detail["notes"] = list(table.notes)
    return detail


def _places(context: PassContext, layer: Layer, calls: list[fx.Node], schemes: tuple[int, ...]) -> Places:
    space = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    entering = leaving = 0
    middle = dict.fromkeys(Folding.of(layer).distinct(schemes), 0)
    for call in calls:
        source = matching.tensor_input(call)
        assert source is not None, "the survey admits only calls with one tensor"
        given, made = context.shapes.shape(source), context.shapes.shape(call)
        others = int(np.prod(given[: len(given) - space - 1]))
        into, out = (given[-space:], made[-space:]) if space else ((), ())
        entering += others * int(np.prod(into))
        leaving += others * int(np.prod(out))
        for scheme in middle:
            middle[scheme] += others * between(layer, scheme, into, out)
    return Places(entering, leaving, middle, bool(getattr(layer, "transposed", False)))


class _Survey:
    """The layers of a graph by path, each with its calls; and what looks like one and is refused."""

    def __init__(self, context: PassContext) -> None:
        self.layers: dict[str, tuple[Layer, list[fx.Node]]] = {}
        self.refusals: list[Refusal] = []
        seen: set[int] = set()
        for node in context.gm.graph.nodes:
            if matching.is_call(node, _FUNCTIONS):
                self.refusals.append(Refusal(node, "called as a function; tracing with example inputs makes it a module"))
            module = context.module(node)
            if not isinstance(module, LAYERS) or id(module) in seen:
                continue
            seen.add(id(module))
            calls = list(context.aliasing.calls(module))
            if reason := _obstacle(context, module, calls):
                self.refusals.append(Refusal(node, reason))
            else:
                self.layers[str(node.target)] = module, calls  # type: ignore[assignment]


_FUNCTIONS = ("linear", *(f"conv{t}{i}d" for t in ("", "_transpose") for i in (1, 2, 3)))


def _obstacle(context: PassContext, layer: nn.Module, calls: list[fx.Node]) -> str | None:
    """Why ``layer`` cannot be replaced by a pair."""
    if type(layer) not in LAYERS:
        return f"a {type(layer).__name__} is a subclass that may compute something else"
    if reason := matching.override_of(layer):
        return reason
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
        return f"has a weight of type {type(weight).__name__}, dtype {weight.dtype}, layout {weight.layout}"
    for name, parameter in layer.named_parameters():
        own = {f"{path}.{name}" for path in context.aliasing.paths(layer)}
        elsewhere = [other for other in context.aliasing.names(parameter) if other not in own]
        elsewhere += [f"node {n}" for n in context.aliasing.readers(parameter) if n not in calls]
        if elsewhere:
            return f"has a {name} that is tied or read elsewhere ({', '.join(elsewhere)})"
    if any(len(call.args) + len(call.kwargs) != 1 or matching.tensor_input(call) is None for call in calls):
        return "is called with other than one tensor"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """One layer and what is to become of it."""

    gm: fx.GraphModule
    path: str
    layer: Layer
    calls: list[fx.Node]
    choice: Choice | None
    moments: Mapping[int, Moments]

    def operate(self) -> Mapping[str, Any] | None:
        """Put the pair in place of the layer at every call of it."""
        if self.choice is None:
            return None
        encoder, decoder = self._pair(self.choice)
        owner_path, _, leaf = self.path.rpartition(".")
        holder = nn.Module().train(self.layer.training)
        holder.encoder, holder.decoder = encoder, decoder
        setattr(self.gm.get_submodule(owner_path), leaf, holder)
        for call in self.calls:
            source = matching.tensor_input(call)
            with self.gm.graph.inserting_before(call):
                between_ = self.gm.graph.call_module(f"{self.path}.encoder", (source,))
                last = self.gm.graph.call_module(f"{self.path}.decoder", (between_,))
            editing.replace(call, last)
        return None

    def _pair(self, c: Choice) -> tuple[nn.Module, nn.Module]:
        folding, found = Folding.of(self.layer), self.moments.get(c.scheme)
        usable = found is not None and found.count > 0
        centred = usable and self.layer.bias is not None
        moment = None
        if usable:
            assert found is not None
            moment = slices_of(found.covariance() if centred else found.second, c.slices)
        left, right = factors(self.layer, folding, c.scheme, c.slices, c.rank, moment)
        bias = None if self.layer.bias is None else self.layer.bias.detach()
        if centred:
            assert found is not None
            missing = folding.matrices(self.layer, c.scheme, c.slices) - left @ right
            bias = corrected_bias(self.layer, folding, c.scheme, missing, found)
        return folding.pair(self.layer, c.scheme, left, right, bias)
