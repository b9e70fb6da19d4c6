"""The check of ``Guarantee.EXACT``: run the pass again in float64, where a right rewriting and a wrong one look unlike.

Two graphs that are equal over the reals differ by rounding alone. In float64 that is some 1e-16 times what the network
amplifies; a network that amplified it beyond :data:`EXACT_BOUND` = 1e-9, by 4.5e6, would turn float32's rounding of
6e-8 into errors of 0.27 and be of no use to anybody. A defect as small as a factor of 1 + 1e-6, which float32 hides,
stands a thousand times above the bound. There are such networks yet, with random weights: where the bound is broken
the original is run again with its weights changed by as much as float64 rounds them, and a hundred times what that does
to its output is allowed. A defect of 1e-6 is ten million times as large.

The rewritten graph in the model's own dtype u is what the user gets, and float64 does not see it: a weight may have
overflowed to infinity in float16, say. It is held to ``max(sqrt(eps), 10 r)`` where eps is the machine epsilon of the
coarsest dtype in use and r is the original's own rounding error, measured against its float64 copy: the rewritten graph
may round differently, but it keeps half of its digits or rounds at most ten times as badly as the original did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.outputs import Comparison, compare, non_finite, relative_error, tensor_leaves
from fxcompress.apply import apply_pass
from fxcompress.calibration import Changed
from fxcompress.double import LowestPrecision, default_float64, double_example, double_graph
from fxcompress.editing import private_copy
from fxcompress.errors import FxCompressError, PreconditionError, VerificationError
from fxcompress.examples import evaluate, fresh, with_larger_batch
from fxcompress.pass_base import Example, Pass
from fxcompress.report import PassRecord

__all__ = [
    "EXACT_BOUND",
    "Change",
    "Trial",
    "Verdict",
    "check_outputs",
    "failure",
    "prove",
    "reference_output",
    "trial_on_larger_batch",
]

EXACT_BOUND = 1e-9
_MARGIN = 100


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found; the fields are those of :class:`~fxcompress.report.PassRecord`."""

    verified: bool
    how: str
    error: float | None = None
    error_in_dtype: float | None = None
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Change:
    """A pass at work: the graph ``before`` and ``after`` it, the names of the nodes it rewrote, what to run on.

    ``history`` is what passes did before.
    """

    pass_: Pass
    before: fx.GraphModule
    after: fx.GraphModule
    sites: tuple[str, ...]
    example: Example
    batches: Iterable[Example] | None = None
    history: Sequence[PassRecord] = ()

    def compared(self) -> Change:
        """The same of those parts of the graphs that the guarantee is about (:meth:`Pass.compared`)."""
        before, example = self.pass_.compared(self.before, self.example)
        after, _ = self.pass_.compared(self.after, self.example)
        batches = None if self.batches is None else Changed(self.batches, self._part)
        return dataclasses.replace(self, before=before, after=after, example=example, batches=batches)

    def _part(self, batch: Example) -> Example:
        return self.pass_.compared(self.before, batch)[1]


def failure(change: Change, what: str) -> VerificationError:
    """The error to raise when ``change`` does not keep its guarantee."""
    sites = ", ".join(change.sites[:8]) + (f" and {len(change.sites) - 8} more" if len(change.sites) > 8 else "")
    return VerificationError(
        f"pass {change.pass_.name!r} ({change.pass_.guarantee.value}) does not keep its guarantee: {what}. It rewrote "
        f"{sites}. That is a defect of the pass and not of your model, which is unchanged: leave the pass out and "
        "report it"
    )


def reference_output(change: Change, example: Example, label: str) -> Any:
    """What the graph before the pass gives.

    Raises:
        PreconditionError: there is a NaN in it, so that nothing could be compared.
    """
    output = evaluate(change.before, example)
    where = non_finite(output)
    if where:
        raise PreconditionError(
            f"the model gives NaN at {where} on {label}, before pass {change.pass_.name!r} did anything; nothing can "
            "be compared with that. Use other inputs, repair the model, or pass verify=False"
        )
    return output


def check_outputs(change: Change, after: fx.GraphModule, example: Example, reference: Any, label: str) -> Comparison:
    """Compare ``after`` with ``reference``; what must hold under every guarantee.

    Raises:
        VerificationError: ``after`` fails, gives NaN, or gives other containers, shapes, dtypes or plain values.
    """
    try:
        output = evaluate(after, example)
    except Exception as error:  # any failure of the rewritten graph, where the original ran
        raise failure(change, f"the rewritten graph fails on {label}: {type(error).__name__}: {error}") from error
    where = non_finite(output)
    if where:
        raise failure(change, f"the rewritten graph gives NaN at {where} on {label}")
    found = compare(reference, output)
    if found.structural:
        raise failure(change, f"on {label}, {'; '.join(found.structural[:5])}")
    return found


@dataclasses.dataclass(frozen=True)
class Trial:
    """Inputs under a name, and what the graph before the pass gives on them."""

    label: str
    example: Example
    reference: Any


def _trials(change: Change) -> list[Trial]:
    """The example, fresh inputs, and another batch size; of the last two those that the original can run on."""
    label = "the example inputs"
    trials = [Trial(label, change.example, reference_output(change, change.example, label))]
    found = (
        _trial(change, fresh(change.before, change.example, seed=1), "fresh inputs"),
        trial_on_larger_batch(change),
    )
    return trials + [trial for trial in found if trial is not None]


def _trial(change: Change, example: Example, label: str) -> Trial | None:
    """``example`` with what the original gives on it; ``None`` if that fails or is not finite."""
    try:
        reference = evaluate(change.before, example)
    except Exception:  # invented inputs need not fit: a fixed batch size, indices out of range
        return None
    return Trial(label, example, reference) if non_finite(reference) is None else None


def trial_on_larger_batch(change: Change) -> Trial | None:
    """Inputs with a batch larger than the example's, and what the original gives; ``None`` if it runs on none."""
    larger = with_larger_batch(change.before, change.example, seed=2)
    return None if larger is None else _trial(change, larger, "a larger batch")


@dataclasses.dataclass(frozen=True)
class _InFloat64:
    """The rerun: its largest error, the largest that was allowed, the original's rounding error; or why none."""

    error: float = 0.0
    bound: float = EXACT_BOUND
    rounding: float = 0.0
    impossible: str = ""


def prove(change: Change) -> Verdict:
    """Check that ``change`` is exact.

    Where the graph cannot compute in float64 (a module with a dtype of its own inside), what is left is the check in
    the model's own dtype, and the verdict says that nothing was proved.

    Raises:
        VerificationError: it is not.
        PreconditionError: the original gives NaN.
    """
    whole, change = change, change.compared()
    trials = _trials(change)
    exact = _rerun(whole, trials)
    error, notes = _check_in_dtype(change, trials, exact)
    labels = ", ".join(trial.label for trial in trials)
    if exact.impossible:
        how = f"not proved: {exact.impossible}; compared in the model's own dtype only, on {labels}"
        return Verdict(False, how, None, error, (*notes, how))
    how = f"float64 rerun, error {exact.error:.1e} (at most {exact.bound:.0e}) on {labels}"
    return Verdict(True, how, exact.error, error, notes)


def _rerun(change: Change, trials: list[Trial]) -> _InFloat64:
    with default_float64():
        before = double_graph(change.before)
        after = private_copy(before)
        batches = None if change.batches is None else Changed(change.batches, double_example)
        example = double_example(change.example)
        twin = dataclasses.replace(change, before=before, after=after, example=example, batches=batches)
        try:
            original, _ = change.pass_.compared(before, example)
            references = [evaluate(original, double_example(trial.example)) for trial in trials]
        except Exception as error:
            return _InFloat64(impossible=f"the graph does not run in float64 ({type(error).__name__}: {error})")
        if any(non_finite(reference) for reference in references):
            return _InFloat64(impossible="the float64 copy gives NaN where the model gives none")
        try:
            applied = apply_pass(change.pass_, after, example, batches, lambda event: None, change.history)
        except FxCompressError as error:
            return _InFloat64(impossible=f"the pass does not run in float64 ({error})")
        known = {node.name for node in change.before.graph.nodes}  # and not those that the pass itself made
        missing = known.intersection(change.sites).difference(site.node for site in applied.sites)
        if missing:
            raise failure(change, f"the float64 rerun, which is to prove it, leaves {', '.join(sorted(missing))} alone")
        return _compare_in_float64(twin.compared(), trials, references)


def _compare_in_float64(twin: Change, trials: list[Trial], references: list[Any]) -> _InFloat64:
    error, rounding, largest = 0.0, 0.0, EXACT_BOUND
    for trial, reference in zip(trials, references, strict=True):
        rounding = max(rounding, _rounding(trial.reference, reference))
        label = f"{trial.label} in float64"
        example = double_example(trial.example)
        found = check_outputs(twin, twin.after, example, reference, label)
        error, bound = max(error, found.error), EXACT_BOUND
        if found.error > bound:
            bound = max(bound, _MARGIN * _noise(twin.before, example, reference))
            largest = max(largest, bound)
        if found.error <= bound and not found.discrete:
            continue
        lowest = LowestPrecision()
        with lowest:  # nothing but the graph: making the float64 inputs would count as float32
            evaluate(twin.before, example)
        if lowest.eps > torch.finfo(torch.float64).eps:
            why = f"something inside the graph computes in {lowest.dtype} ({lowest.operator}) whatever its input"
            return _InFloat64(rounding=rounding, impossible=why)
        what = "; ".join(found.discrete) or f"{found.where} differs by {found.error:.1e} (at most {bound:.0e})"
        raise failure(twin, f"on {label}, {what}")
    return _InFloat64(error, largest, rounding)


def _noise(gm: fx.GraphModule, example: Example, reference: Any) -> float:
    """How far the output of ``gm``, in float64, moves when its weights do by the last bit: the most of three tries."""
    found = 0.0
    for seed in range(3):
        moved, generator = private_copy(gm), torch.Generator().manual_seed(seed)
        for tensor in (*moved.parameters(), *moved.buffers()):
            if tensor.is_floating_point():
                signs = torch.randint(2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
                tensor.detach().mul_(1 + torch.finfo(torch.float64).eps * signs)
        found = max(found, compare(reference, evaluate(moved, example)).error)
    return found


def _rounding(reference: Any, in_float64: Any) -> float:
    """How far the original's output is from that of its float64 copy; tensors that do not correspond are left out."""
    exact = dict(tensor_leaves(in_float64))
    errors = [
        relative_error(exact[path], tensor)
        for path, tensor in tensor_leaves(reference)
        if tensor.is_floating_point() and path in exact and exact[path].shape == tensor.shape
    ]
    return max((error for error in errors if math.isfinite(error)), default=0.0)


def _check_in_dtype(change: Change, trials: list[Trial], exact: _InFloat64) -> tuple[float, tuple[str, ...]]:
    bound = max(math.sqrt(_coarsest_eps(change)), 10 * exact.rounding)
    error, notes = 0.0, []
    for trial in trials:
        found = check_outputs(change, change.after, trial.example, trial.reference, trial.label)
        error = max(error, found.error)
        if not found.error <= bound:
            raise failure(
                change,
                f"on {trial.label}, {found.where} differs by {found.error:.1e} (at most {bound:.1e}) in the model's "
                "own dtype, which is no rounding",
            )
        if found.discrete and exact.impossible:
            raise failure(change, f"on {trial.label}, {'; '.join(found.discrete)}")
        # Equal in float64: an argmax of two values that rounding makes equal, say.
        notes += [f"by rounding, {text} on {trial.label}" for text in found.discrete]
    return error, tuple(notes)


def _coarsest_eps(change: Change) -> float:
    values = (change.example.args, change.example.kwargs)
    tensors = [*change.before.parameters(), *change.before.buffers(), *(t for _, t in tensor_leaves(values))]
    eps = [torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()]
    return max(eps, default=torch.finfo(torch.float64).eps)
