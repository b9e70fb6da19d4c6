"""The one loop: copy, check, calibrate, sites, rewrite, verify, record. The caller's model never changes."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from fxcompress.analysis.cost import Cost, cost
from fxcompress.apply import Applied, apply_pass
from fxcompress.calibration import Batches, Changed, as_batches
from fxcompress.checks import check_model, non_finite_state
from fxcompress.editing import private_copy
from fxcompress.errors import FxCompressError, PassError, PreconditionError, UsageError
from fxcompress.examples import as_example, check_fits
from fxcompress.gate import groups, judged
from fxcompress.order import in_order
from fxcompress.pass_base import Example, Guarantee, Need, Pass
from fxcompress.progress import Event, Progress, reporting
from fxcompress.report import PassRecord, RefusalRecord, Report, SiteRecord, Total, attach, detach, plain
from fxcompress.reporting.figures import shortened
from fxcompress.reporting.sketch import CURVE, curves_in, sketch
from fxcompress.trace import trace
from fxcompress.verify import Change, Verdict, verify

__all__ = ["PassPlan", "Plan", "compile", "plan", "private_graph"]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What compile and plan were asked to do, checked and in one form."""

    model: nn.Module
    passes: tuple[Pass, ...]
    example: Example | None
    batches: Batches | Changed | None
    verify: bool
    warnings: tuple[str, ...] = ()


def compile(
    model: nn.Module,
    passes: str | Pass | Sequence[str | Pass],
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Any = None,
    verify: bool = True,
    reject_slower: bool = False,
    progress: bool | Progress | None = None,
) -> fx.GraphModule:
    """Record ``model`` as a graph and let ``passes`` rewrite it one after another, each step verified and recorded.

    Args:
        model: the module to compress, which is never changed; on any device, in training or evaluation mode. A graph
            that ``compile`` returned may be given again; its report is continued.
        passes: Pass objects, registered names, ``"name:option=value,option=value"``, or names of
            :func:`~fxcompress.presets`; may be empty. See :func:`~fxcompress.recommended_order`.
        example_inputs: a tensor, or a tuple or list of positional arguments, of any batch size. Without them the
            model is traced symbolically, and nothing can be verified.
        example_kwargs: keyword arguments.
        calibration: an iterable of batches, for passes that want statistics: tensors, tuples or lists of positional
            arguments, or mappings of keyword arguments; inputs only, no labels.
        verify: check the guarantee of each pass (about ten runs of the model a pass).
        reject_slower: measure the latency of the graph before and after each pass on the example inputs, in turns, on
            this machine as it is set up, and go back to the graph before a pass that makes it slower by more than the
            noise and 5%. Passes that pay together, as ``quantize`` and ``lower-int8``, are judged together. The record
            says so; what is there for training is not measured.
        progress: ``None`` for silence, ``True`` for a bar on stderr, or a function of a
            :class:`~fxcompress.progress.Event`.

    Returns:
        A plain ``GraphModule``; :func:`fxcompress.report` gives its history.

    Raises:
        UsageError: the call is wrong: no module, unknown pass or option, a wrong order, inputs that do not fit,
            ``reject_slower`` without inputs.
        TraceError: the model cannot be recorded.
        PreconditionError: a pass refuses the model; weights that are NaN or missing.
        PassError: a pass fails; the message says at which node.
        VerificationError: a pass does not keep its guarantee.
    """
    with reporting(progress) as tell:
        start = time.perf_counter()
        job = _prepare(model, passes, example_inputs, example_kwargs, calibration, verify)
        if reject_slower and job.example is None:
            raise UsageError("reject_slower=True measures how long a call takes; pass `example_inputs`")
        tell(Event("trace"))
        gm, earlier = private_graph(job.model, job.example)
        first = last = _measure(gm, job.example)
        graph_before = sketch(gm, first)
        records: list[PassRecord] = []
        past = () if earlier is None else earlier.passes
        for group in groups(job.passes):
            together = job.passes[group.start : group.stop]
            run = _run_and_judge if reject_slower else _run
            gm, last, made, job = run(job, together, gm, last, (*past, *records), tell)
            records += made
        total = _total(first, last, time.perf_counter() - start, job.warnings)
        tell(Event("done", done=1, total=1))
    curves = tuple(curves_in(detail for record in records for detail in record.details))
    history = Report(tuple(map(_without_curves, records)), total, graph_before, sketch(gm, last), curves)
    attach(gm, history if earlier is None else earlier.followed_by(history))
    for text in (*job.warnings, *_unique_warnings(records)):
        warnings.warn(text, stacklevel=2)
    return gm


_Ran = tuple[fx.GraphModule, Cost, list[PassRecord], _Job]


def _run(
    job: _Job, passes: Sequence[Pass], gm: fx.GraphModule, size: Cost, history: Sequence[PassRecord], tell: Progress
) -> _Ran:
    """Run passes one after another: the graph, what it costs, a record of each, and the job with its inputs."""
    records: list[PassRecord] = []
    for pass_ in passes:
        gm, size, record, job = _step(job, pass_, gm, size, (*history, *records), tell)
        records.append(record)
    return gm, size, records, job


def _run_and_judge(
    job: _Job, passes: Sequence[Pass], gm: fx.GraphModule, size: Cost, history: Sequence[PassRecord], tell: Progress
) -> _Ran:
    """The same, and back to where it began if all of them together make the graph slower."""
    graphs, records, before = [gm], list[PassRecord](), (gm, size, job)
    for pass_ in passes:
        gm, size, made, job = _run(job, [pass_], gm, size, (*history, *records), tell)
        graphs.append(gm)
        records += made
    if job.example is None or job.example is not before[2].example:  # it takes other inputs now
        return gm, size, records, job
    tell(Event("time", passes[-1].name))
    records, stays = judged(passes, graphs, records, job.example)
    gm, size, job = (gm, size, job) if stays else before
    return gm, size, records, job


def _prepare(
    model: nn.Module, passes: Any, example_inputs: Any, example_kwargs: Any, calibration: Any, verify: bool
) -> _Job:
    """Check everything that can be checked before any work is done."""
    model = check_model(model)
    resolved = tuple(in_order(passes))
    example = as_example(example_inputs, example_kwargs)
    for pass_ in resolved:
        _check_needs(pass_, example, calibration)
    bad = non_finite_state(model)
    texts = []
    if bad:
        more = f"; and {len(bad) - 5} more" if bad[5:] else ""
        text = f"the model's weights are not finite: {'; '.join(bad[:5])}{more}"
        if verify:
            raise PreconditionError(f"{text}. Nothing can be verified against that; repair them or pass verify=False")
        texts.append(text)
    if verify and example is None and resolved:
        texts.append("nothing is verified, as there are no example inputs to run; pass `example_inputs`")
    batches = None
    if calibration is not None:
        batches = as_batches(calibration, keep=_read_often(resolved, verify), device=_device_of(model))
    return _Job(model, resolved, example, batches, verify, tuple(texts))


def _check_needs(pass_: Pass, example: Example | None, calibration: Any) -> None:
    for need, given, argument in (
        (Need.EXAMPLE_INPUTS, example is not None, "example_inputs"),
        (Need.CALIBRATION, calibration is not None, "calibration"),
    ):
        if need in pass_.needs and not given:
            raise PreconditionError(f"pass {pass_.name!r} needs `{argument}` and none were given; nothing was changed")


def _read_often(passes: Sequence[Pass], verify: bool) -> bool:
    """Whether the calibration data may be read more than once, so that a generator must be kept in memory."""
    reads = [(p, p.calibration_reads()) for p in passes]
    measured = verify and any(p.guarantee is Guarantee.APPROXIMATE for p in passes)
    return measured or sum(n for _, n in reads) > 1 or any(n and (verify or p.repeat) for p, n in reads)


def _device_of(model: nn.Module) -> torch.device | None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def private_graph(model: nn.Module, example: Example | None) -> tuple[fx.GraphModule, Report | None]:
    """A graph of ``model`` that shares nothing with it, and the report it had."""
    if not isinstance(model, fx.GraphModule):
        args = None if example is None else example.args
        kwargs = None if example is None else dict(example.kwargs)
        return trace(model, args, example_kwargs=kwargs), None
    gm = private_copy(model)
    if example is not None:
        check_fits(gm, example)
    return gm, detach(gm)


def _measure(gm: fx.GraphModule, example: Example | None, pass_: Pass | None = None) -> Cost:
    """The cost of ``gm``; without MACs if there is no example."""
    if example is None:
        return cost(gm)
    try:
        return cost(gm, example.args, example.kwargs)
    except FxCompressError:
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = f"fails on the example inputs: {type(error).__name__}: {error}"
        if pass_ is None:
            raise UsageError(f"the model {reason}") from error
        raise PassError(f"the graph that pass {pass_.name!r} left {reason}. Your model is unchanged") from error


def _step(
    job: _Job, pass_: Pass, before: fx.GraphModule, size: Cost, history: Sequence[PassRecord], tell: Progress
) -> tuple[fx.GraphModule, Cost, PassRecord, _Job]:
    """One pass: from the graph before it and its cost to those after it, the record, and the job for what follows."""
    start = time.perf_counter()
    after = private_copy(before)
    applied = apply_pass(pass_, after, job.example, job.batches, tell, history)
    tell(Event("verify", pass_.name))
    verdict = _judge(job, pass_, before, after, applied, history)
    following = _extended(job, pass_, after)
    new_size = _measure(after, following.example, pass_) if applied.sites else size
    record = PassRecord(
        name=pass_.name,
        options=plain({f.name: getattr(pass_, f.name) for f in dataclasses.fields(pass_)}),  # type: ignore[arg-type]
        guarantee=pass_.guarantee.value,
        sites=len(applied.sites),
        refusals=applied.refusals,
        error=verdict.error,
        error_in_dtype=verdict.error_in_dtype,
        verified=verdict.verified,
        verification=verdict.how,
        parameters_before=size.parameters,
        parameters_after=new_size.parameters,
        macs_before=size.macs,
        macs_after=new_size.macs,
        bytes_before=size.bytes,
        bytes_after=new_size.bytes,
        seconds=time.perf_counter() - start,
        details=tuple(site.to_dict() for site in applied.sites),
        warnings=verdict.warnings,
    )
    return after, new_size, record, following


def _extended(job: _Job, pass_: Pass, after: fx.GraphModule) -> _Job:
    """``job`` with inputs as ``after``, which ``pass_`` left, takes them."""
    if job.example is None or type(pass_).extended is Pass.extended:
        return job
    batches = None if job.batches is None else Changed(job.batches, partial(pass_.extended, after))
    return dataclasses.replace(job, example=pass_.extended(after, job.example), batches=batches)


def _judge(
    job: _Job,
    pass_: Pass,
    before: fx.GraphModule,
    after: fx.GraphModule,
    applied: Applied,
    history: Sequence[PassRecord],
) -> Verdict:
    if not applied.sites:
        return Verdict(True, "no sites: the graph is as it was", 0.0, 0.0)
    if not job.verify:
        return Verdict(False, "unverified: verify=False")
    if job.example is None:
        return Verdict(False, "unverified: no example inputs")
    names = tuple(site.node for site in applied.sites)
    return verify(Change(pass_, before, after, names, job.example, job.batches, history))


def _total(first: Cost, last: Cost, seconds: float, texts: tuple[str, ...]) -> Total:
    sizes = (first.parameters, last.parameters, first.macs, last.macs, first.bytes, last.bytes)
    if last.uncounted:
        texts += (f"MACs leave out what these operators do: {', '.join(sorted(last.uncounted))}",)
    return Total(*sizes, seconds, texts)


def _without_curves(record: PassRecord) -> PassRecord:
    """``record`` without what :func:`curves_in` took from it."""
    details = tuple({key: value for key, value in detail.items() if key != CURVE} for detail in record.details)
    return dataclasses.replace(record, details=details)


def _unique_warnings(records: Sequence[PassRecord]) -> list[str]:
    return list(dict.fromkeys(f"pass {record.name!r}: {text}" for record in records for text in record.warnings))


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """What one pass would do."""

    name: str
    sites: tuple[SiteRecord, ...]
    refusals: tuple[RefusalRecord, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`compile` would do, pass by pass. ``str(plan)`` is a table."""

    passes: tuple[PassPlan, ...]

    def __str__(self) -> str:
        rows: list[list[str]] = []
        for p in self.passes:
            details = [", ".join(f"{k}={shortened(str(v), 60)}" for k, v in site.detail.items()) for site in p.sites]
            rows += [[p.name, "rewrite", s.node, s.target, d] for s, d in zip(p.sites, details, strict=True)]
            rows += [[p.name, "leave", r.node, r.target, r.reason] for r in p.refusals]
            if not p.sites and not p.refusals:
                rows.append([p.name, "nothing to do", "", "", ""])
        return tabulate(rows, headers=["pass", "would", "node", "target", "details"], disable_numparse=True)


def plan(
    model: nn.Module,
    passes: str | Pass | Sequence[str | Pass],
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Any = None,
) -> Plan:
    """Say what :func:`compile` would rewrite and what it would leave alone, and why, without changing anything.

    Each pass is shown the graph as the passes before it would leave it, on a copy that is thrown away; nothing is
    verified. Arguments and errors are those of :func:`compile`.
    """
    job = _prepare(model, passes, example_inputs, example_kwargs, calibration, verify=False)
    gm, _ = private_graph(job.model, job.example)
    plans = []
    for pass_ in job.passes:
        applied = apply_pass(pass_, gm, job.example, job.batches, lambda event: None)
        job = _extended(job, pass_, gm)
        plans.append(PassPlan(pass_.name, applied.sites, applied.refusals))
    return Plan(tuple(plans))
