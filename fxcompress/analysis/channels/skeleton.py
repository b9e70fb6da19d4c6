"""Running a graph for the shapes of its values, without working the values out.

Labels depend on values in one way only: through indices and sizes that the model computes. Those come from constants,
buffers and integer inputs, and are real here; what depends on a floating-point input or on a parameter is on PyTorch's
"meta" device, where operators work out shapes and do nothing else. It takes neither the time nor the memory of a
forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels.modules import keeps_shape
from fxcompress.analysis.channels.probing import acts_elementwise
from fxcompress.analysis.running import GraphRunner
from fxcompress.editing import is_inplace
from fxcompress.matching import override_of
from fxcompress.modules import GroupedLinear, MultiHeadAttentionForward, Refill, ScaledDotProductAttention

__all__ = ["NeedsValues", "SkeletonRunner"]

_OWN_MODULES = (GroupedLinear, MultiHeadAttentionForward, Refill, ScaledDotProductAttention)
_MOVES_TO_DEVICE = frozenset(("cpu", "cuda"))


class NeedsValues(Exception):
    """The graph does something that cannot be followed without its values."""


class SkeletonRunner(GraphRunner):
    """A run in which what depends on floating-point inputs or on parameters has a shape and no values.

    Whatever a run raises may mean no more than that it wants values: run the graph with ``values=True`` then.

    Args:
        gm: the graph.
        values: work everything out, as any :class:`GraphRunner` does.
    """

    def __init__(self, gm: fx.GraphModule, values: bool) -> None:
        super().__init__(gm)
        self.values = values
        self._empty_twins: dict[int, nn.Module] = {}
        self._elementwise: dict[tuple[int, torch.Size, torch.dtype], bool] = {}

    def is_elementwise(self, module: nn.Module, x: torch.Tensor) -> bool:
        """:func:`acts_elementwise`, asked once."""
        key = (id(module), x.shape, x.dtype)
        if key not in self._elementwise:
            self._elementwise[key] = acts_elementwise(module, x)
        return self._elementwise[key]

    # ------------------------------------------------------------------------------------------------- interpreter
    def run_node(self, n: fx.Node) -> Any:
        if not self.values and n.args and is_inplace(n):
            target = self.env.get(n.args[0]) if isinstance(n.args[0], fx.Node) else None
            others = fx.node.map_arg((n.args[1:], n.kwargs), lambda a: self.env[a])
            if isinstance(target, torch.Tensor) and not target.is_meta and _any_meta(others):
                raise NeedsValues(f"{n.name} writes into a tensor that has values")
        return super().run_node(n)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().placeholder(target, args, kwargs)
        if self.values:
            return value
        return pytree.tree_map_only(torch.Tensor, lambda t: t if _is_discrete(t) else _emptied(t), value)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _emptied(value) if not self.values and isinstance(value, nn.Parameter) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.values or not _any_meta((args, kwargs)):
            return super().call_function(target, args, kwargs)
        if target is getattr and args[1] == "device":  # so that what is made from it has values
            return self._device()
        return super().call_function(target, *_all_emptied(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.values or not _any_meta((args, kwargs)):
            return super().call_method(target, args, kwargs)
        if target in _MOVES_TO_DEVICE:
            return args[0]
        return super().call_method(target, *_all_emptied(args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        empty = any(True for _ in module.parameters()) or _any_meta((args, kwargs))
        if self.values or not empty:
            return super().call_module(target, args, kwargs)
        if keeps_shape(module) and override_of(module) is None:
            return torch.empty_like(args[0] if args else next(iter(kwargs.values())), device="meta")
        if all(_is_known(m) for m in module.modules()):
            args, kwargs = _all_emptied(args, kwargs)
            return self._empty_twin(module)(*args, **kwargs)
        # A module of unknown code may keep what it is given, so it is given nothing that only this run knows.
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and override_of(module) is None:
            x: torch.Tensor = args[0]
            if self.is_elementwise(module, x):
                return torch.empty_like(x)
        raise NeedsValues(f"{target} is of unknown code")

    def _empty_twin(self, module: nn.Module) -> nn.Module:
        """``module`` with shapes in place of parameters and buffers."""
        if override_of(module) is not None:
            raise NeedsValues("hooks and the like are unknown code")
        if id(module) not in self._empty_twins:
            twin = copy.copy(module)
            for table in ("_parameters", "_buffers"):
                tensors = getattr(module, table)
                object.__setattr__(twin, table, {k: None if t is None else _emptied(t) for k, t in tensors.items()})
            children = {k: None if m is None else self._empty_twin(m) for k, m in module._modules.items()}
            object.__setattr__(twin, "_modules", children)
            self._empty_twins[id(module)] = twin
        return self._empty_twins[id(module)]

    def _device(self) -> torch.device:
        tensors = (*self._graph_module().parameters(), *self._graph_module().buffers())
        return next((t.device for t in tensors), torch.device("cpu"))


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") or type(module) in _OWN_MODULES


def _is_discrete(t: torch.Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


def _emptied(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_meta else torch.empty_like(t, device="meta")


def _all_emptied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """All tensors without values; devices are "meta"."""

    def empty(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _emptied(value)
        return torch.device("meta") if isinstance(value, torch.device) else value

    return pytree.tree_map(empty, (tuple(args), dict(kwargs)))  # type: ignore[no-any-return]


def _any_meta(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, (tuple, list)):
        return any(_any_meta(v) for v in value)
    if isinstance(value, dict):
        return any(_any_meta(v) for v in value.values())
    return False
