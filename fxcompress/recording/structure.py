"""Containers of any kind taken apart into leaves with paths, and put together again as arguments of a graph."""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Path", "children", "follow", "is_namedtuple", "leaves", "to_argument"]

Path = tuple[tuple[str, Any], ...]
"""Steps from a container to a leaf: ("item", key) or ("attr", name)."""

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, nn.Module)


def is_namedtuple(value: Any) -> bool:
    """Whether ``value`` is a named tuple or one of torch's own result tuples."""
    return isinstance(value, tuple) and (hasattr(value, "_fields") or type(value).__module__ == "torch.return_types")


def children(value: Any) -> list[tuple[tuple[str, Any], Any]]:
    """The parts of a container, one level down, each with the step that leads to it; nothing for an atom."""
    if isinstance(value, (torch.Tensor, *_ATOMS)) or callable(value):
        return []
    if isinstance(value, Mapping):
        return [(("item", k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [(("item", i), v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(("attr", f.name), getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    if hasattr(value, "__dict__"):
        return [(("attr", k), v) for k, v in vars(value).items()]
    return []


def leaves(value: Any, path: Path = (), _seen: frozenset[int] = frozenset()) -> Iterator[tuple[Path, Any]]:
    """Every leaf (tensor or atom) in ``value`` with its path; an object met inside itself is left out."""
    parts = children(value)
    if not parts or id(value) in _seen:
        if id(value) not in _seen:
            yield path, value
        return
    for step, part in parts:
        yield from leaves(part, (*path, step), _seen | {id(value)})


def follow(graph: fx.Graph, node: fx.Node, path: Path, made: dict[tuple[fx.Node, Path], fx.Node]) -> fx.Node:
    """The node that reads the part at ``path`` of what ``node`` returns; made where the graph's cursor stands."""
    for i, (kind, key) in enumerate(path):
        prefix = (node, (path[i],))
        if prefix not in made:
            target: Callable[..., Any] = operator.getitem if kind == "item" else getattr
            made[prefix] = graph.call_function(target, (node, key))
        node = made[prefix]
    return node


def to_argument(
    value: Any,
    of_tensor: Callable[[torch.Tensor], Any],
    of_object: Callable[[Any], Any],
    graph: fx.Graph,
    recur: Callable[[Any], Any],
) -> Any:
    """``value`` as an argument of a node: tensors through ``of_tensor``, containers rebuilt as they are.

    Plain tuples, lists, dicts and slices are arguments by themselves; a named tuple, an ordered dict or a dataclass
    becomes a node that calls its class; anything else goes to ``of_object``. ``recur`` is asked for the parts.
    """
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, slice):
        return slice(recur(value.start), recur(value.stop), recur(value.step))
    if isinstance(value, (torch.Size, range)):
        return tuple(value)
    if type(value) in (tuple, list, dict):
        if type(value) is dict:
            return {k: recur(v) for k, v in value.items()}
        return type(value)(recur(v) for v in value)
    if value is None or value is ... or isinstance(value, (str, int, float, complex, torch.dtype, torch.device)):
        return value
    if isinstance(value, (torch.memory_format, torch.layout)):
        return value
    if is_namedtuple(value):
        if type(value).__module__ == "torch.return_types":
            return tuple(recur(v) for v in value)
        return graph.call_function(type(value), tuple(recur(v) for v in value))
    if type(value) is collections.OrderedDict:
        return graph.call_function(collections.OrderedDict, ([(k, recur(v)) for k, v in value.items()],))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass_argument(value, recur, of_object, graph)
    return of_object(value)


def _dataclass_argument(
    value: Any, recur: Callable[[Any], Any], of_object: Callable[[Any], Any], graph: fx.Graph
) -> Any:
    fields = dataclasses.fields(value)
    names = {f.name for f in fields}
    if not all(f.init for f in fields) or (hasattr(value, "__dict__") and set(vars(value)) - names):
        return of_object(value)
    given = {f.name: getattr(value, f.name) for f in fields if getattr(value, f.name) is not f.default}
    return graph.call_function(type(value), (), {k: recur(v) for k, v in given.items()})
