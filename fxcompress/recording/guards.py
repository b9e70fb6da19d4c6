"""What the finished graph checks about its inputs, so that nothing that was fixed while recording is wrong silently.

A guard is one node without readers, right after the placeholders; it takes part in no pattern and in no data flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.storable import storable

__all__ = ["check_input"]


@storable
def check_input(value: Any, expected: Any, name: str) -> Any:
    """Raise if ``value`` is not what the graph was recorded for.

    Args:
        value: an input of the graph.
        expected: ``("tensor", sizes, floating)`` with ``None`` for a free size, for any sizes, or for any dtype;
            ``("value", v)``;
            ``("sequence", parts)``; ``("mapping", {key: part})``; ``("object", {attribute: part})``;
            ``("any",)``.
        name: what to call the input in a message.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if isinstance(value, fx.Proxy):  # the graph is being traced again (by unpickling, say): stay in it
        return value.tracer.create_proxy("call_function", check_input, (value, expected, name), {})
    kind = expected[0]
    if kind == "tensor":
        _check_tensor(value, expected[1], expected[2], name)
    elif kind == "value":
        if type(value) is not type(expected[1]) or value != expected[1]:
            raise ValueError(
                f"this graph was recorded with {name}={expected[1]!r}, got {value!r}; trace the model again with the "
                "other value"
            )
    elif kind == "sequence":
        if len(value) != len(expected[1]):
            raise ValueError(f"this graph was recorded with {len(expected[1])} entries in {name}, got {len(value)}")
        for i, part in enumerate(expected[1]):
            check_input(value[i], part, f"{name}[{i}]")
    elif kind == "mapping":
        _check_keys(value, expected[1], name)
        for key, part in expected[1].items():
            check_input(value[key], part, f"{name}[{key!r}]")
    elif kind == "object":
        for key, part in expected[1].items():
            check_input(getattr(value, key), part, f"{name}.{key}")
    return None


def _check_tensor(value: Any, sizes: tuple[int | None, ...] | None, floating: bool | None, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"this graph was recorded with a tensor for {name}, got {type(value).__name__}")
    if floating is not None and value.is_floating_point() is not floating:
        wanted = "floating point" if floating else "integers or booleans"
        raise ValueError(f"this graph was recorded with {wanted} in {name}, got {value.dtype}; trace the model again")
    if sizes is None:
        return
    fits = value.dim() == len(sizes)
    for i, size in enumerate(sizes):
        fits = fits and (size is None or value.shape[i] == size)
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(
            f"this graph was recorded for {name} of shape ({wanted}), got {tuple(value.shape)}; sizes inside it are "
            "fixed: trace the model again at the other size, or name the dimension in dynamic_dims"
        )


def _check_keys(value: Any, expected: Mapping[Any, Any], name: str) -> None:
    if set(value.keys()) != set(expected.keys()):
        raise ValueError(
            f"this graph was recorded with the keys {sorted(map(str, expected))} in {name}, "
            f"got {sorted(map(str, value))}"
        )


torch.fx.node.has_side_effect(check_input)
