"""Inputs to run a graph on: read from what the caller gave, changed in dtype, values or batch size."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from fxcompress.analysis.inputs import bind_inputs
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.running import undisturbed
from fxcompress.errors import UsageError
from fxcompress.pass_base import Example
from fxcompress.recording.inputs import read_inputs

__all__ = [
    "as_example",
    "check_fits",
    "evaluate",
    "fresh",
    "map_tensors",
    "on_larger_batch",
    "reproducible",
    "run",
    "with_larger_batch",
]


T = TypeVar("T")


def as_example(example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> Example | None:
    """What the caller gave as one :class:`Example`; ``None`` if nothing was given.

    Args:
        example_inputs: a tensor (the only positional argument), a tuple or list of positional arguments, an
            :class:`Example`, or ``None``.
        example_kwargs: keyword arguments, or ``None``.

    Raises:
        UsageError: it is something else.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise UsageError(f"`example_kwargs` is a dict of keyword arguments, not {type(example_kwargs).__name__}")
    if isinstance(example_inputs, Example):
        return Example(example_inputs.args, {**example_inputs.kwargs, **(example_kwargs or {})})
    if example_inputs is None:
        return Example((), dict(example_kwargs)) if example_kwargs else None
    if isinstance(example_inputs, torch.Tensor):
        return Example((example_inputs,), dict(example_kwargs or {}))
    if isinstance(example_inputs, (tuple, list)):
        return Example(tuple(example_inputs), dict(example_kwargs or {}))
    raise UsageError(
        "`example_inputs` is a tensor, or a tuple or list of positional arguments, not "
        f"{type(example_inputs).__name__}; for keyword arguments use `example_kwargs`"
    )


def map_tensors(example: Example, change: Callable[[torch.Tensor], torch.Tensor]) -> Example:
    """A copy of ``example``, containers of any kind included, with ``change(tensor)`` in place of each tensor."""
    # deepcopy takes what its memo says for an object: this rebuilds every container without knowing any of them.
    whole = (example.args, dict(example.kwargs))
    memo = {id(tensor): change(tensor.detach()) for _, tensor in tensor_leaves(whole)}
    args, kwargs = copy.deepcopy(whole, memo)
    return Example(args, kwargs)


def run(gm: fx.GraphModule, example: Example) -> Any:
    """``gm(*args, **kwargs)`` on a copy of the inputs, so that in-place operations do not reach the caller's."""
    own = map_tensors(example, torch.Tensor.clone)
    return gm(*own.args, **own.kwargs)


def evaluate(gm: fx.GraphModule, example: Example) -> Any:
    """The output of ``gm``, without gradients and always from the same random state; ``gm`` stays as it was."""
    with torch.no_grad(), reproducible(gm, example):
        return run(gm, example)


@contextlib.contextmanager
def reproducible(gm: fx.GraphModule, example: Example) -> Iterator[None]:
    """Start from a fixed random state, and put buffers and the random state back on leaving."""
    inputs = [tensor for _, tensor in tensor_leaves((example.args, example.kwargs))]
    with undisturbed(gm, inputs):
        # Not torch.manual_seed: it would also seed CUDA devices that neither gm nor the inputs are on.
        torch.default_generator.manual_seed(0)
        for index in {t.device.index for t in (*gm.parameters(), *gm.buffers(), *inputs) if t.is_cuda}:
            torch.cuda.default_generators[index].manual_seed(0)
        yield


def check_fits(gm: fx.GraphModule, example: Example) -> None:
    """Refuse inputs that the graph cannot be called with.

    Raises:
        UsageError: too many or too few of them, or unknown names.
    """
    bind_inputs(gm, example.args, example.kwargs)


def fresh(gm: fx.GraphModule, example: Example, seed: int) -> Example:
    """Inputs of the same kind (shapes, dtypes, range of values) with other values."""
    args, kwargs = read_inputs(gm, example.args, example.kwargs).changed({}, _harmless(example, seed)).call()
    return Example(args, kwargs)


def _harmless(example: Example, seed: int) -> int | None:
    """``seed``, or ``None`` (values stay) if shuffled integers might be indices out of range on CUDA, where that is no
    exception but the end of the process's CUDA context."""
    tensors = [tensor for _, tensor in tensor_leaves((example.args, example.kwargs))]
    risky = any(t.is_cuda and not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool) for t in tensors)
    return None if risky else seed


def with_larger_batch(gm: fx.GraphModule, example: Example, seed: int) -> Example | None:
    """Fresh inputs with one element more in the first dimension of every tensor that is as long there as the first
    tensor is; ``None`` if there is no such dimension. Whether ``gm`` runs on them is for the caller to find out."""
    inputs = read_inputs(gm, example.args, example.kwargs)
    tensors = {place: tensor for place, tensor in inputs.tensors().items() if tensor.dim()}
    size = next(iter(tensors.values())).shape[0] if tensors else 0
    if not size:
        return None
    sizes = {(*place, 0): size + 1 for place, tensor in tensors.items() if tensor.shape[0] == size}
    args, kwargs = inputs.changed(sizes, _harmless(example, seed)).call()
    return Example(args, kwargs)


def on_larger_batch(gm: fx.GraphModule, example: Example, look: Callable[[Example], T]) -> T | None:
    """What ``look``, which runs ``gm``, says of inputs with a larger batch; ``None`` if there are none or it fails."""
    larger = with_larger_batch(gm, example, seed=0)
    if larger is None:
        return None
    try:
        return look(larger)
    except Exception:  # invented inputs need not fit: a fixed batch size, indices out of range
        return None
