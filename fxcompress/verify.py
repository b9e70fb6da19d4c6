"""One check for each guarantee. A comparison that NaN would pass is a defect, so NaN is looked for first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from fxcompress.analysis.outputs import non_finite, tensor_leaves
from fxcompress.calibration import check_batch
from fxcompress.examples import evaluate, reproducible, run
from fxcompress.pass_base import Example, Guarantee
from fxcompress.proof import Change, Verdict, check_outputs, failure, prove, reference_output, trial_on_larger_batch

__all__ = ["Change", "Verdict", "verify"]


def verify(change: Change) -> Verdict:
    """Check that ``change`` keeps the guarantee of its pass.

    Raises:
        VerificationError: it does not.
        PreconditionError: the graph before the pass gives NaN, so that nothing can be compared.
    """
    if change.pass_.guarantee is Guarantee.EXACT:
        return prove(change)
    change = change.compared()
    verdict = _approximate(change) if change.pass_.guarantee is Guarantee.APPROXIMATE else _retrain(change)
    if not _runs_on_larger_batch(change):
        return verdict
    return dataclasses.replace(verdict, how=f"{verdict.how}; runs on a larger batch")


def _runs_on_larger_batch(change: Change) -> bool:
    """Whether the graph before the pass takes a batch larger than the example; the graph after it must, too.

    An example of a single row makes what does not grow with the batch look as if it did.

    Raises:
        VerificationError: it does not, or gives NaN, or other containers, shapes or dtypes.
    """
    trial = trial_on_larger_batch(change)
    if trial is None:
        return False
    check_outputs(change, change.after, trial.example, trial.reference, trial.label)
    return True


def _measure(change: Change) -> tuple[float, str, tuple[str, ...]]:
    """The largest error on the example and the calibration data, where it is, and integer outputs that differ."""
    error, place, notes = 0.0, "", []
    for label, example in _data(change):
        reference = reference_output(change, example, label)
        found = check_outputs(change, change.after, example, reference, label)
        notes += [f"{text} on {label}" for text in found.discrete]
        if found.error > error:
            error, place = found.error, f"{found.where} on {label}"
    return error, place, tuple(notes)


def _data(change: Change) -> Iterator[tuple[str, Example]]:
    yield "the example inputs", change.example
    for index, batch in enumerate(change.batches or ()):
        check_batch(change.before, batch, index)
        yield f"batch {index} of the calibration data", batch


def _approximate(change: Change) -> Verdict:
    error, place, notes = _measure(change)
    bound = change.pass_.error_bound()
    if bound is not None and not error <= bound:
        raise failure(change, f"{place} differs by {error:.1e}, and it declares at most {bound:.1e}")
    declared = "no bound declared" if bound is None else f"at most {bound:.1e} declared"
    data = "the example inputs" + ("" if change.batches is None else " and the calibration data")
    return Verdict(True, f"error {error:.1e} ({declared}) on {data}", error, error, notes)


def _retrain(change: Change) -> Verdict:
    label = "the example inputs"
    reference = reference_output(change, change.example, label)
    found = check_outputs(change, change.after, change.example, reference, label)
    where = non_finite(evaluate(change.after, change.example), infinite=True)
    if where and not non_finite(reference, infinite=True):
        raise failure(change, f"the rewritten graph gives an infinity at {where} on {label}")
    flow = _check_gradients(change)
    how = f"structure, shapes, dtypes and finiteness on {label}; {flow}"
    return Verdict(True, how, found.error, found.error, tuple(f"{text} on {label}" for text in found.discrete))


def _check_gradients(change: Change) -> str:
    try:
        before = _gradients(change.before, change.example)
    except RuntimeError as error:
        return f"gradients not checked, as the graph before the pass cannot go backward ({error})"
    if not any(gradient is not None for gradient in before.values()):
        return "gradients not checked, as the graph before the pass gave none"
    try:
        after = _gradients(change.after, change.example)
    except RuntimeError as error:
        raise failure(change, f"the rewritten graph cannot go backward: {error}") from error
    frozen = {name for name, p in change.before.named_parameters() if not p.requires_grad}
    for name, parameter in change.after.named_parameters():
        if not parameter.is_floating_point() or name in frozen:
            continue
        if not parameter.requires_grad:
            if not frozen:  # where some were frozen before, a new one may well stand for a frozen one
                raise failure(change, f"the parameter {name!r} is frozen and none was before")
            continue
        gradient = after[name]
        if gradient is None:
            if name not in before or before[name] is not None:
                raise failure(change, f"no gradient reaches the parameter {name!r}")
        elif non_finite(gradient, infinite=True) and not _was_non_finite(before.get(name)):
            raise failure(change, f"the gradient of the parameter {name!r} is not finite")
    return "gradients reach every parameter"


def _was_non_finite(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and non_finite(gradient, infinite=True) is not None


def _gradients(gm: fx.GraphModule, example: Example) -> dict[str, torch.Tensor | None]:
    """The gradient of a random sum of all outputs with respect to each parameter; ``.grad`` is not touched."""
    parameters = {n: p for n, p in gm.named_parameters() if p.requires_grad and p.is_floating_point()}
    with torch.enable_grad(), reproducible(gm, example):
        outputs = [t for _, t in tensor_leaves(run(gm, example)) if t.requires_grad]
        if not outputs or not parameters:
            return dict.fromkeys(parameters)
        # Random weights: the plain sum of a softmax is constant and would hide what flows.
        weights = [torch.rand_like(t) * torch.isfinite(t.detach()) for t in outputs]
        found = torch.autograd.grad(outputs, list(parameters.values()), weights, allow_unused=True)
    return dict(zip(parameters, found, strict=True))
