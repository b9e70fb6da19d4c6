"""Outputs of any kind: which tensors are in them, and how far two of them are apart.

The distance of a tensor b from a reference a is ``max|a - b| / max|a|``, both maxima over the finite elements: relative
to the largest value, so that an element that happens to be near zero does not count as a large error. Where the
reference is infinite (a masked logit, say) the other must be the same infinity. NaN equals nothing, and a distance
that involves one is infinite, so that no comparison with it can pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["Comparison", "compare", "non_finite", "relative_error", "tensor_leaves"]

_ATOMS = (
    torch.Tensor,
    torch.nn.Module,
    torch.dtype,
    torch.device,
    torch.Size,
    str,
    bytes,
    type,
    int,
    float,
    complex,
    type(None),
)


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container, each with how to write the step to it; ``None`` for a leaf."""
    if isinstance(value, _ATOMS) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", part) for name, part in zip(value._fields, value, strict=True)]
    if isinstance(value, (tuple, list)):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return [(f".{name}", getattr(value, name)) for name in names]
    if hasattr(value, "__dict__"):
        return [(f".{name}", part) for name, part in vars(value).items()]
    return None


def _walk(value: Any, path: str, above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any, bool]]:
    """(path, object, is it a leaf) for ``value`` and all in it; an object met inside itself is left out."""
    parts = _children(value)
    yield path, value, parts is None
    for step, part in parts or ():
        if id(part) not in above and part is not value:
            yield from _walk(part, path + step, above | {id(value)})


def tensor_leaves(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in ``value`` with the expression that reaches it, such as ``output.logits`` or ``output[0]['a']``.

    Looks into tuples, lists, mappings, named tuples, dataclasses and any object with a ``__dict__``.
    """
    for where, item, _ in _walk(value, path):
        if isinstance(item, torch.Tensor):
            yield where, item


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def relative_error(reference: torch.Tensor, other: torch.Tensor, *, equal_nan: bool = False) -> float:
    """``max|reference - other| / max|reference|`` over the finite elements, computed in float64.

    Args:
        reference: what ``other`` is held against, any shape and dtype.
        other: a tensor of the same shape.
        equal_nan: count a NaN in both at the same place as equal (for questions of sameness, not of quality).

    Returns:
        The error; 0.0 if all elements are equal, ``inf`` if a NaN is in either or if infinities differ. If the
        reference is all zero there is nothing to be relative to: then it is ``max|other|``.
    """
    a, b = _dense(reference), _dense(other).to(reference.device)
    same = a == b
    if equal_nan:
        same |= a.isnan() & b.isnan()
    if bool(same.all()):
        return 0.0
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not bool((same | finite).all()):
        return math.inf
    difference = float((a - b)[finite].abs().max())
    scale = float(a[finite].abs().max())
    return difference / scale if scale > 0 else difference


def non_finite(value: Any, path: str = "output", *, infinite: bool = False) -> str | None:
    """The path of the first tensor in ``value`` that has a NaN (or, with ``infinite``, an infinity) in it."""
    for where, tensor in tensor_leaves(value, path):
        if tensor.is_floating_point() or tensor.is_complex():
            dense = _dense(tensor)
            bad = ~torch.isfinite(dense) if infinite else torch.isnan(dense)
            if bool(bad.any()):
                return where
    return None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How an output differs from its reference.

    Attributes:
        error: the largest relative error of a floating-point tensor (and of a Python float).
        where: the path of the tensor that has it.
        structural: differences of containers, shapes, dtypes and plain values, in words.
        discrete: integer and boolean tensors whose elements differ, in words.
    """

    error: float = 0.0
    where: str = "output"
    structural: tuple[str, ...] = ()
    discrete: tuple[str, ...] = ()


def compare(reference: Any, other: Any, *, equal_nan: bool = False) -> Comparison:
    """Compare two outputs of any kind, part by part; ``equal_nan`` as in :func:`relative_error`."""
    a, b = list(_walk(reference, "output")), list(_walk(other, "output"))
    structural: list[str] = []
    theirs = {path: item for path, item, _ in b}
    ours = {path for path, _, _ in a}
    structural += [f"{path} is new" for path in theirs if path not in ours]
    discrete: list[str] = []
    error, where = 0.0, "output"
    for path, item, leaf in a:
        if path not in theirs:
            structural.append(f"{path} is missing")
            continue
        against = theirs[path]
        difference = _differs(item, against, leaf)
        if difference:
            structural.append(f"{path}: {difference}")
        elif isinstance(item, torch.Tensor) and not (item.is_floating_point() or item.is_complex()):
            wrong = int((item != against.to(item.device)).sum())
            if wrong:
                discrete.append(f"{path} ({item.dtype}) differs in {wrong} of {item.numel()} elements")
        elif isinstance(item, (torch.Tensor, float, complex)):
            found = relative_error(_as_tensor(item), _as_tensor(against), equal_nan=equal_nan)
            if found > error:
                error, where = found, path
    return Comparison(error, where, tuple(structural), tuple(discrete))


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _differs(a: Any, b: Any, leaf: bool) -> str | None:
    """What makes the kind of ``b`` another than that of ``a``; values of floats and tensors are not looked at."""
    if type(a) is not type(b) and not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return f"expected {type(a).__name__}, found {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape:
            return f"expected shape {tuple(a.shape)}, found {tuple(b.shape)}"
        return None if a.dtype == b.dtype else f"expected {a.dtype}, found {b.dtype}"
    # Objects without an equality of their own would differ from run to run.
    incomparable = type(a).__eq__ is object.__eq__  # type: ignore[comparison-overlap]
    if not leaf or isinstance(a, (float, complex)) or incomparable:
        return None
    return None if a == b else f"expected {a!r}, found {b!r}"
