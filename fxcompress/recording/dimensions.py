"""Which dimensions of the inputs are free, at what sizes to record, on which sizes the finished graph insists."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from fxcompress.errors import UsageError
from fxcompress.recording.comparing import difference, run, without_state_of_runs
from fxcompress.recording.inputs import Dimension, Inputs, guard
from fxcompress.recording.structure import Path

__all__ = ["fixed_dimensions", "free_dimensions", "insert_guards", "other_sizes", "size_choices"]


def free_dimensions(
    inputs: Inputs, dynamic_batch: bool, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> dict[Dimension, str]:
    """The free dimensions and their names: those of ``dynamic_dims``, and "batch" for dimension 0 of every tensor
    whose size there is that of the first tensor.

    Raises:
        UsageError: ``dynamic_dims`` names what is not there, or dimensions of one name differ in size.
    """
    tensors = inputs.tensors()
    result: dict[Dimension, str] = {}
    for name, dims in dynamic_dims.items():
        tensor = tensors.get((name, ()))
        if tensor is None:
            known = sorted(n for n, path in tensors if not path)
            raise UsageError(f"dynamic_dims names {name!r}, which is no tensor argument; there are {known}")
        for dim, label in dims.items():
            if not -tensor.dim() <= dim < tensor.dim():
                raise UsageError(f"dynamic_dims names dimension {dim} of {name}, which has {tensor.dim()}")
            result[name, (), dim % tensor.dim()] = label
    if dynamic_batch:
        dense = [(key, t) for key, t in tensors.items() if t.dim() > 0]
        for (name, path), tensor in dense:
            if tensor.shape[0] == dense[0][1].shape[0] > 0:
                result.setdefault((name, path, 0), "batch")
    for label in set(result.values()):
        _size_of(label, result, tensors)
    return result


def _size_of(label: str, dims: Mapping[Dimension, str], tensors: Mapping[tuple[str, Path], torch.Tensor]) -> int:
    sizes = {tensors[name, path].shape[dim] for (name, path, dim), of in dims.items() if of == label}
    if len(sizes) != 1:
        raise UsageError(f"the dimensions named {label!r} in dynamic_dims have different sizes: {sorted(sizes)}")
    return sizes.pop()


def size_choices(inputs: Inputs, dims: Mapping[Dimension, str]) -> Iterator[dict[str, tuple[int, int]]]:
    """Sizes for two recordings, by the name of the dimension; several choices, in the order to try them.

    Small batches first, then multiples of the example's, for models that fold something else into the batch. Each
    dimension changes by another factor, so that it can be told from the others; the larger size comes first, so that
    what a model counts up from run to run does not look like a size.
    """
    labels = sorted(set(dims.values()), key=lambda label: label != "batch")
    if not labels:
        return
    base = {label: _size_of(label, dims, inputs.tensors()) for label in labels}
    named = {label: (base[label] * (k + 2), base[label]) for k, label in enumerate(labels) if label != "batch"}
    if "batch" not in base:
        yield named
        return
    n = base["batch"]
    larger, smaller = [s for s in (4, 3, 2) if s != n][-2:]
    yield {"batch": (larger, smaller), **named}
    if n > 1:
        yield {"batch": (3 * n, 2 * n), **named}


def fixed_dimensions(
    model: nn.Module, gm: fx.GraphModule, inputs: Inputs, free: Mapping[Dimension, str], *, trial: bool
) -> set[Dimension]:
    """The dimensions at whose other sizes ``gm`` is not known to be right: each group of equal sizes is tried at
    another one, and must there give what the model gives. Without ``trial`` (it takes two runs a group): all that are
    not free."""
    groups: dict[int, list[Dimension]] = {}
    for (name, path), tensor in inputs.tensors().items():
        for dim, size in enumerate(tensor.shape):
            if (name, path, dim) not in free:
                groups.setdefault(size, []).append((name, path, dim))
    fixed: set[Dimension] = set()
    for size, dims in groups.items():
        if not trial or not _hold(model, gm, inputs, dims, size):
            fixed.update(dims)
    return fixed


def other_sizes(
    model: nn.Module, inputs: Inputs, free: Mapping[Dimension, str]
) -> Iterator[tuple[str, Inputs, object]]:
    """Where else the model runs, of the sizes that two recordings may mislead about: a batch of one, and two more sizes
    of every named dimension. Each with the inputs and what the model gives."""
    for label in sorted(set(free.values())):
        dims = [d for d, of in free.items() if of == label]
        size = _size_of(label, free, inputs.tensors())
        for other in (1,) if label == "batch" else (1, size + 1, 4 * size + 1):
            changed = inputs.changed(dict.fromkeys(dims, other), seed=4)
            if other == size:
                continue
            try:
                expected = run(without_state_of_runs(model), *changed.call())
            except Exception:  # the model itself does not run there
                continue
            yield f"at {label} {other}", changed, expected


def _hold(model: nn.Module, gm: fx.GraphModule, inputs: Inputs, dims: list[Dimension], size: int) -> bool:
    """Whether ``gm`` is right at other sizes than ``size`` of ``dims``, at as many of a few as the model runs at.

    A multiple keeps what is divisible so, and the next size does not (padding by parity shows only there). They change
    together and one by one: a ratio of two sizes shows only if one of them changes.
    """
    ran = False
    for other in (size + 1, 2 * size if size < 64 else size + 32, size + 7):
        choices = [dims] if len(dims) == 1 else [dims, *([dim] for dim in dims)]
        for chosen in choices:
            agree = _agree(model, gm, inputs.changed(dict.fromkeys(chosen, other), seed=3))
            if agree is False:
                return False
            ran = ran or bool(agree)
    return ran


def _agree(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> bool | None:
    """Whether the graph gives what the model gives; ``None`` if the model does not run on ``inputs``."""
    try:
        expected = run(without_state_of_runs(model), *inputs.changed({}).call())
    except Exception:  # sizes that nobody asked for: that they do not fit is an answer
        return None
    try:
        got = run(gm, inputs.changed({}).values(), {})
    except Exception:  # whatever it is that was fixed while recording
        return False
    return difference(expected, got) is None


def insert_guards(gm: fx.GraphModule, inputs: Inputs, fixed: set[Dimension], ranks: bool, dtypes: bool) -> None:
    """Let ``gm`` refuse inputs whose ``fixed`` sizes, structure or plain values are not those of ``inputs``; also other
    ``ranks``, and integers for floating point, if Python has asked for those."""

    def sizes(name: str, path: Path, tensor: torch.Tensor) -> tuple[tuple[int | None, ...] | None, bool | None]:
        result = tuple(s if (name, path, d) in fixed else None for d, s in enumerate(tensor.shape))
        shown = result if ranks or any(s is not None for s in result) else None
        return shown, tensor.is_floating_point() if dtypes else None

    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    arguments = {a.name: a for a in inputs.arguments}
    if not placeholders:
        return
    with gm.graph.inserting_before(placeholders[-1].next):
        for node in placeholders:
            name = str(node.target)
            guard(gm.graph, node, arguments[name], functools.partial(sizes, name))
    gm.recompile()
