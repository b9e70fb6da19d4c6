"""How far two outputs of any kind are apart, written without fxcompress, whose own comparison is under test here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["TOLERANCE", "distance", "forward", "tensors"]

TOLERANCE = 1e-6
"""What counts as equal: ``max|a - b| <= 1e-6 max|a|`` for every tensor of the output."""


def forward(module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The output, without gradients and with the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return module(*inputs[0], **inputs[1])


def tensors(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, with their places."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors(part, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")


def distance(expected: Any, got: Any) -> float:
    """The largest ``max|a - b| / max|a|`` over the tensors; 0.0 is equality to the last bit.

    Infinite where containers, shapes or dtypes differ, where integers do, and where one has a NaN or an infinity that
    the other has not.
    """
    a, b = dict(tensors(expected)), dict(tensors(got))
    if type(expected) is not type(got) or list(a) != list(b) or not a:
        return math.inf
    return max(_apart(a[path], b[path]) for path in a)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    if not a.is_floating_point() or not bool((same | (a.isfinite() & b.isfinite())).all()):
        return math.inf
    scale = float(a[a.isfinite()].abs().max())
    return float((a.double() - b.double())[~same].abs().max()) / (scale or 1.0)
