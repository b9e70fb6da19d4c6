"""A float64 copy of a graph: the same function with 2^29 times less rounding than in float32.

Parameters, buffers and inputs become float64, and so does every dtype that the graph itself names: a constant in an
argument, ``.half()``, the dtype that a factory such as ``torch.zeros`` takes from PyTorch's default. What happens
inside a module that the graph calls whole cannot be rewritten; :class:`LowestPrecision` tells whether it left float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.editing import get_attribute, private_copy, set_attribute
from fxcompress.examples import map_tensors
from fxcompress.pass_base import Example

__all__ = ["LowestPrecision", "default_float64", "double_example", "double_graph"]

_WIDER: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_NARROWING = frozenset(("float", "half", "bfloat16"))


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def double_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` that computes in float64 (complex128). Node names stay, tied parameters stay tied."""
    copied = private_copy(gm)
    copied._apply(_wider)  # type: ignore[no-untyped-call]
    for node in copied.graph.nodes:
        _widen(copied, node)
    copied.recompile()
    return copied


def _widen(gm: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "get_attr":
        value = get_attribute(gm, str(node.target))
        if isinstance(value, torch.Tensor) and value.dtype in _WIDER:  # a plain attribute, which _apply leaves alone
            set_attribute(gm, str(node.target), _wider(value))
        return
    if node.op == "call_method" and node.target in _NARROWING:
        node.target = "double"
    if node.op == "call_function" and node.target in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
        node.target = torch.Tensor.double
    node.args = map_aggregate(node.args, _wider_constant)
    node.kwargs = map_aggregate(node.kwargs, _wider_constant)


def _wider_constant(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def double_example(example: Example) -> Example:
    """``example`` with its floating-point tensors in float64."""
    return map_tensors(example, lambda tensor: _wider(tensor).clone())


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """Let ``torch.zeros(3)`` make float64 while the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LowestPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes the operator that gave the floating-point dtype with the largest ``eps``.

    Attributes:
        eps: the largest machine epsilon of any value.
        dtype: its dtype; ``None`` if nothing floating-point was computed.
        operator: the operator that gave it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0
        self.dtype: torch.dtype | None = None
        self.operator = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                eps = float(torch.finfo(leaf.dtype).eps)
                if eps > self.eps:
                    self.eps, self.dtype, self.operator = eps, leaf.dtype, str(func)
        return result
