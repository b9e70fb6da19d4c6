"""The call: checks, measurements, plans, and what is given back."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress.calibration import Batches, as_batches, checked
from fxcompress.checks import check_model
from fxcompress.errors import UsageError
from fxcompress.examples import as_example
from fxcompress.pass_base import Example, Pass
from fxcompress.pipeline import compile as compile_
from fxcompress.pipeline import private_graph
from fxcompress.progress import Event, Progress, reporting
from fxcompress.recovery.settings import described
from fxcompress.registry import resolve_all
from fxcompress.report import attach, report
from fxcompress.searching.building import Workshop
from fxcompress.searching.exploring import Clock, Exploration
from fxcompress.searching.measuring import MEASURES, Judge
from fxcompress.searching.result import SearchResult, undominated
from fxcompress.searching.store import Store

__all__ = ["DEFAULT_PASSES", "search"]

DEFAULT_PASSES = (
    "remove-identity",
    "prune-channels:reconstruct=True",
    "fold-batch-norm",
    "alds:error=activation",
    "quantize",
    "lower-int8",
)
"""What a search chooses from, in the order in which it is done."""


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: Mapping[str, float],
    max_drop: float = 0.01,
    evaluate: Callable[[fx.GraphModule], Any] | None = None,
    calibration: Any = None,
    held_out: Any = None,
    passes: Sequence[str | Pass] = DEFAULT_PASSES,
    tries: int = 16,
    time_limit: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | Progress | None = None,
) -> SearchResult:
    """Find passes, and what they do to each layer, that make ``model`` so small and lose as little as can be.

    First every layer is compressed alone, a little and more, by each pass that has knobs (:meth:`Pass.knobs`), to see
    how the output changes. Then each pass is tried on all layers at once. From these numbers a knapsack says what to do
    to which layer; these pipelines are built and measured, and the numbers corrected by what comes out.

    Args:
        model: the module to compress, which is never changed.
        example_inputs: as for :func:`fxcompress.compile`; sizes and times are of one run on them.
        example_kwargs: keyword arguments.
        target: one of ``"latency"``, ``"macs"``, ``"params"`` and ``"bytes"``, and the fraction of the original's that
            the result may have, such as ``{"latency": 0.5}``. Latency is that of an eager run on this machine; what
            would be the result is timed twice, and the longer time counts.
        max_drop: what may be lost of what ``evaluate`` says, or, without it, the relative error that outputs may have.
        evaluate: a function of a graph module that says how good it is; higher is better.
        calibration: batches, as for :func:`fxcompress.compile`; two at least, better ten.
        held_out: batches on which outputs are compared with the original's; without them those of ``calibration``,
            on which layers that were refitted look better than they are.
        passes: what to choose from, in the order in which it is to be done. Passes with knobs are used or not; exact
            ones without are always used; other ones without belong to the pass before them.
        tries: how many pipelines are built at most, besides those with one pass on all layers.
        time_limit: seconds after which no more is measured; the result is then the best so far. One measurement that
            has begun is finished.
        resume: a file in which what is measured is kept. If it exists, what it has of the same model, data and passes
            (and function, by its name) is not measured again, whatever the target.
        progress: as for :func:`fxcompress.compile`.

    Returns:
        The best that was found with what it takes to make it, and the front; see :class:`SearchResult`. Where nothing
        meets both conditions, :attr:`SearchResult.met` is false and there is no ``module``.

    Raises:
        UsageError: the call is wrong.
        TraceError: the model cannot be recorded.
        PreconditionError: a pass that is always used refuses the model.
    """
    measure, part = _target(target, max_drop, tries)
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"time_limit is in seconds, above 0, got {time_limit!r}")
    clock = Clock(time_limit)
    with reporting(progress) as tell:
        tell(Event("trace"))
        example = as_example(example_inputs, example_kwargs)
        if example is None:
            raise UsageError("a search runs the model; give `example_inputs`")
        chosen = resolve_all(list(passes))
        origin, _ = private_graph(check_model(model), example)
        data = _Data.of(origin, calibration, held_out)
        workshop = Workshop(origin, chosen, example, as_batches(data.fitted), as_batches(data.fitted_few))
        if not workshop.stages:
            reasons = "; ".join(f"{name}: {why}" for name, why in workshop.left_out) or "none of them has knobs"
            raise UsageError(f"there is nothing to choose: {reasons}. Give other `passes`")
        judge = Judge(origin, example, data.judged, data.judged_few, evaluate)
        store = Store(resume, _fingerprint(origin, chosen, example, data, evaluate))
        exploration = Exploration(workshop, judge, store, example, clock, tell)
        complete = exploration.run(measure, part, tries)
        result = _concluded(exploration, measure, part, max_drop, complete)
        if result.met:
            graph = _compiled(model, result, example, data)
            result = dataclasses.replace(result, graph=graph)
        tell(Event("done", done=1, total=1))
    return result


def _target(target: Any, max_drop: float, tries: int) -> tuple[str, float]:
    if not isinstance(target, Mapping) or len(target) != 1 or next(iter(target)) not in MEASURES:
        raise UsageError(f"`target` has one of {', '.join(MEASURES)}, as in {{'latency': 0.5}}; got {target!r}")
    measure, part = next(iter(target.items()))
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part < 1:
        raise UsageError(f"the target is the fraction of {measure} that may be left, above 0 and below 1, got {part!r}")
    if not max_drop >= 0:
        raise UsageError(f"max_drop is what may be lost, at least 0, got {max_drop!r}")
    if tries < 1:
        raise UsageError(f"tries must be at least 1, got {tries!r}")
    return measure, float(part)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Batches to fit to and to judge by, and fewer of them for single layers."""

    fitted: list[Example]
    fitted_few: list[Example]
    judged: list[Example]
    judged_few: list[Example]

    @classmethod
    def of(cls, gm: fx.GraphModule, calibration: Any, held_out: Any) -> _Data:
        """What the caller gave, a quarter of it for single layers; these are never judged by what they were fitted
        to, if there are two batches."""
        if calibration is None:
            raise UsageError("a search compares outputs on data; give `calibration`, some ten batches")
        device = next((p.device for p in gm.parameters()), None)

        def read(data: Any) -> list[Example]:
            return checked(gm, data if isinstance(data, Batches) else as_batches(data, device=device))

        fitted = read(calibration)
        few = math.ceil(len(fitted) / 4)
        if held_out is None:
            return cls(fitted, fitted[:few], fitted, fitted[-few:])
        judged = read(held_out)
        return cls(fitted, fitted[:few], judged, judged[: math.ceil(len(judged) / 4)])


def _fingerprint(origin: fx.GraphModule, passes: Sequence[Pass], example: Example, data: _Data, evaluate: Any) -> str:
    """What the measurements depend on; times depend on the machine and on threads."""
    parts = [described(p) for p in (origin, list(passes), example, data, evaluate)]
    parts += [repr(list(passes))]  # options of kinds that have no words would look alike
    parts += [torch.__version__, platform.machine(), platform.processor(), str(torch.get_num_threads())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _concluded(exploration: Exploration, measure: str, part: float, max_drop: float, complete: bool) -> SearchResult:
    points = exploration.points
    inside = [p for p in points if p.cost[measure] <= part]
    kept = [p for p in points if p.drop <= max_drop]
    return SearchResult(
        measure=measure,
        target=part,
        max_drop=max_drop,
        front=undominated(points, measure),
        tried=tuple(points),
        within_target=min(inside, key=lambda p: p.order(measure), default=None),
        within_drop=min(kept, key=lambda p: (p.cost[measure], p.drop), default=None),
        sensitivity=exploration.curves(),
        left_out=tuple(exploration.left_out),
        complete=complete,
    )


def _compiled(model: nn.Module, result: SearchResult, example: Example, data: _Data) -> fx.GraphModule:
    """The best point, with every pass verified, and what was measured of single layers in its report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has them
        gm = compile_(model, result.passes, example, calibration=data.fitted)
    history = report(gm)
    attach(gm, dataclasses.replace(history, sensitivity=(*history.sensitivity, *result.sensitivity)))
    return gm
