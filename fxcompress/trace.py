"""Any model that runs -> a ``torch.fx.GraphModule``, by recording a run.

``torch.fx.symbolic_trace`` runs a model on stand-ins for tensors and fails where Python looks at a shape or a value.
Here the model runs on real tensors, so Python control flow, dataclasses, caches and decorators just run, and every
torch call is written down (``recording/``). Two runs at two batch sizes, on different values, tell what follows the
sizes; the finished graph is then held against the model at a third size before anyone gets to see it.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.outputs import compare
from fxcompress.canonical import canonicalize
from fxcompress.checks import check_model
from fxcompress.errors import TraceError, TraceWarning, UsageError
from fxcompress.recording.comparing import difference, run, without_state_of_runs
from fxcompress.recording.dimensions import fixed_dimensions, free_dimensions, insert_guards, other_sizes
from fxcompress.recording.inputs import Inputs, read_inputs
from fxcompress.recording.recording import Recording, finish
from fxcompress.recording.structure import leaves
from fxcompress.scopes import remember_ends

__all__ = ["trace"]

_FUSED_ENCODER_TOLERANCE = 1e-4
"""Rounding separates the fused encoder from the layers by less than this; zeros at padded positions by far more."""


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    opaque: str | Collection[str] = (),
) -> fx.GraphModule:
    """Record ``model`` as a graph that is equal to it, and check that it is.

    The model is copied first and stays as it is. Parameters and buffers keep their names (except those of layers that
    ``canonical/`` had to give a new place), tied ones stay tied; the graph follows ``train()`` and ``eval()``.

    Args:
        model: any module that runs on the example; a ``GraphModule`` is returned as it is.
        example_inputs: positional arguments of forward, a tuple or list (or one tensor). Without any inputs
            ``torch.fx.symbolic_trace`` is used.
        dynamic_batch: let the graph run at every batch size: dimension 0 of all input tensors whose size there is that
            of the first one. Where the model runs at no other batch size, it warns and fixes the size.
        example_kwargs: keyword arguments of forward.
        dynamic_dims: further free dimensions: argument name -> {dimension: a name}; dimensions of one name go together.
        opaque: paths of modules to keep as one call each, or ``"auto"``: those whose Python looks at tensor data.

    Returns:
        The graph. Inputs at whose sizes it would not be right are refused by it with a ``ValueError``.

    Raises:
        UsageError: no module, or inputs that do not fit the signature.
        PreconditionError: a parameter has no values yet (meta device, lazy modules).
        TraceError: the model fails on the example (its own error is the cause), looks at tensor data, does other things
            at other batch sizes, or the graph is not equal to it.
    """
    if isinstance(model, fx.GraphModule):
        return model
    model = check_model(model)
    if example_inputs is None and not example_kwargs:
        return _symbolic(model)
    args = _positional(example_inputs)
    work = _private_copy(model)
    given = read_inputs(work, args, example_kwargs or {})
    inputs = given.changed({})
    free = free_dimensions(inputs, dynamic_batch, dynamic_dims or {})
    batch = free_dimensions(inputs, True, dynamic_dims or {})
    paths, auto = _opaque_paths(work, opaque)
    with _frozen(work):
        reference, seconds = _first_run(work, inputs)
        recording = Recording(work, inputs, seconds, paths, auto)
        gm, uses = recording.graph_module(free)
    finish(gm, recording.root, uses)  # parameters ask for gradients again, and so do those made here
    _check(gm, reference, inputs, "on the example inputs")
    if not recording.slow:
        for where, others, expected in other_sizes(work, inputs, recording.free):
            _check(gm, expected, others, where)
    fixed = set(batch) - set(recording.free)
    if recording.sizes_were_read:
        fixed |= fixed_dimensions(work, gm, inputs, recording.free, trial=not recording.slow)
    insert_guards(gm, inputs, fixed, recording.ranks_were_read, recording.dtypes_were_read)
    remember_ends(gm, recording.ends)
    return gm


# ------------------------------------------------------------------------------------------------- before recording
def _positional(example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    raise UsageError(
        f"example_inputs must be a tensor or a tuple of positional arguments, got {type(example_inputs).__name__}; "
        "keyword arguments go into example_kwargs"
    )


def _private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, with tensors that were left over from a run (which cannot be copied) detached."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for _, leaf in leaves(value) if not isinstance(value, nn.Module) else ():
                if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the model given is never "
            "changed, so it cannot be recorded; give its classes a working __deepcopy__"
        ) from error


@contextlib.contextmanager
def _frozen(work: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the model is run, so that runs keep no graph for backward."""
    flags = [(p, p.requires_grad) for p in work.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _first_run(work: nn.Module, inputs: Inputs) -> tuple[Any, float]:
    args, kwargs = inputs.changed({}).call()
    try:
        once = without_state_of_runs(work)
        before = _plain_state(once)
        start = time.perf_counter()
        resized: dict[str, torch.Tensor] = {}
        output = run(once, args, kwargs, resized=resized)
        seconds = time.perf_counter() - start
        for path, buffer in resized.items():  # a cache that the first run fills: the graph begins after that
            owner, _, name = path.rpartition(".")
            work.get_submodule(owner)._buffers[name] = buffer
        if _plain_state(once) != before:
            _check_stateless(work, output, run(once, *inputs.changed({}).call()))
        if any(isinstance(m, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) for m in work.modules()):
            fused = run(without_state_of_runs(work), *inputs.changed({}).call(), fused=True)
            found = compare(output, fused, equal_nan=True)
            if found.error > _FUSED_ENCODER_TOLERANCE or found.structural:
                warnings.warn(
                    "torch's fused nn.TransformerEncoder kernel, used in eval mode without gradients, gives other "
                    "values than the layers do (it writes zeros at padded positions); the graph does as the layers",
                    TraceWarning,
                    stacklevel=3,
                )
        return output, seconds
    except TraceError:
        raise
    except Exception as error:
        shapes = {".".join(map(str, (name, *path))): tuple(t.shape) for (name, path), t in inputs.tensors().items()}
        raise TraceError(
            f"{type(work).__name__} itself fails on the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {error}. The traceback above is the model's own"
        ) from error


def _plain_state(model: nn.Module) -> list[Any]:
    """Python attributes that a run may leave changed: plain values as they are, containers by their length."""
    state: list[Any] = []
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, type(None))):
                state.append((key, value))
            elif isinstance(value, (list, dict, set)):
                state.append((key, len(value)))
            elif isinstance(value, torch.Tensor):
                state.append((key, id(value)))
    return state


def _check_stateless(work: nn.Module, first: Any, second: Any) -> None:
    found = difference(first, second)
    if found is not None:
        raise TraceError(
            f"{type(work).__name__} gives another output when it is run a second time on the same inputs ({found}): it "
            "keeps state in Python attributes between runs, and no graph can. Reset the state in forward, or keep it "
            "in buffers"
        )


def _symbolic(model: nn.Module) -> fx.GraphModule:
    work = _private_copy(model)
    try:
        gm = fx.symbolic_trace(work)
    except Exception as error:
        raise TraceError(
            f"torch.fx.symbolic_trace cannot trace {type(model).__name__} ({type(error).__name__}: {error}); give "
            "example_inputs, and the model is recorded by running it instead"
        ) from error
    canonicalize(gm)
    return gm


def _opaque_paths(work: nn.Module, opaque: str | Collection[str]) -> tuple[frozenset[str], bool]:
    if opaque == "auto":
        return frozenset(), True
    if isinstance(opaque, str):
        raise UsageError(f'opaque must be "auto" or a collection of module paths, got {opaque!r}')
    modules = dict(work.named_modules())
    for path in opaque:
        if path not in modules or path == "":
            raise UsageError(f"opaque names {path!r}, and the model has no submodule of that path")
    return frozenset(opaque), False


def _check(gm: fx.GraphModule, expected: Any, inputs: Inputs, where: str) -> None:
    """Hold ``gm`` against what the model gave on ``inputs``, at sizes and on values that were not recorded."""
    try:
        got = run(gm, inputs.changed({}).values(), {})
    except Exception as error:
        raise TraceError(
            f"the recorded graph fails {where} ({type(error).__name__}: {error}), where the model "
            "runs; something that follows the inputs was recorded as a constant. dynamic_batch=False may help"
        ) from error
    found = difference(expected, got)
    if found is not None:
        raise TraceError(
            f"the recorded graph is not equal to the model {where}: {found}. Either a number follows the sizes "
            "by a rule that is not known here (dynamic_batch=False fixes the size), or the model does something that "
            "torch calls do not show: state kept between runs, numpy, autocast, its own random numbers"
        )
