"""Removing channels from a graph: slices of parameters; attributes and arguments by the rules of ``sizes.py``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Binding, ChannelGroups, Labelled
from fxcompress.editing import get_attribute
from fxcompress.matching import argument, name_of_call
from fxcompress.passes.pruning.sizes import Call, Scaled, first_input, layer_attributes, resized_call

__all__ = ["Surgery"]

Kept = np.ndarray
"""For each class of atoms whether it stays; boolean, of shape ``(classes,)``."""


class Surgery:
    """Takes out of ``gm`` every class that is not ``kept``.

    :meth:`nodes` are the nodes that have to change; :meth:`operate` changes one of them. Tensors are sliced when the
    first node that uses them is operated on, under all of their names.
    """

    def __init__(self, gm: fx.GraphModule, groups: ChannelGroups, kept: Kept) -> None:
        self.gm, self.groups, self.kept = gm, groups, kept
        self._bindings: dict[int, list[Binding]] = {}
        for binding in groups.bindings:
            if not kept[binding.classes].all():
                self._bindings.setdefault(id(binding.tensor), []).append(binding)
        self._numbers = _Numbers(self)
        self._done: set[int] = set()

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes to operate on, in graph order; of a shared layer the first call."""
        seen: set[int] = set()
        for node in self.gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                target = get_attribute(self.gm, str(node.target))
                if id(target) in seen:
                    continue
                seen.add(id(target))
                if any(id(t) in self._bindings for t in _tensors(target)) or self._attributes(node):
                    yield node
                    continue
            if self._arguments(node) is not None:
                yield node

    def operate(self, node: fx.Node) -> Mapping[str, Any]:
        """Change ``node`` and the tensors and the module behind it; returns what to say of it."""
        said: dict[str, Any] = {}
        new = self._arguments(node)
        if new is not None:
            node.target, node.args, node.kwargs = new.target, self._as_nodes(node, new.args), dict(new.kwargs)
        if node.op in ("call_module", "get_attr"):
            target = get_attribute(self.gm, str(node.target))
            attributes = self._attributes(node)
            for tensor in list(_tensors(target)):
                self._slice(tensor)
            if isinstance(target, nn.Module):
                said = {**_sizes(target, attributes), **self._said_of_channels(node, target)}
                for name, value in attributes.items():
                    setattr(target, name, value)
        return said

    # ------------------------------------------------------------------------------------------------- tensors
    def _slice(self, tensor: torch.Tensor) -> None:
        bindings = self._bindings.get(id(tensor))
        if bindings is None or id(tensor) in self._done:
            return
        self._done.add(id(tensor))
        value = tensor.detach()
        for binding in bindings:
            index = torch.from_numpy(np.flatnonzero(self.kept[binding.classes])).to(tensor.device)
            value = value.index_select(binding.dim, index)
        value = _laid_out_like(value, tensor)
        new = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for name in bindings[0].names:
            owner_path, _, leaf = name.rpartition(".")
            owner = self.gm.get_submodule(owner_path) if owner_path else self.gm
            if leaf in owner._parameters:
                owner._parameters[leaf] = new  # type: ignore[assignment]
            elif leaf in owner._buffers:
                owner._buffers[leaf] = new
            else:
                setattr(owner, leaf, new)

    def new_shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The shape of a parameter or buffer afterwards."""
        shape = list(tensor.shape)
        for binding in self._bindings.get(id(tensor), ()):
            shape[binding.dim] = int(self.kept[binding.classes].sum())
        return tuple(shape)

    # ------------------------------------------------------------------------------------------------- layers
    def _attributes(self, node: fx.Node) -> dict[str, Any]:
        """Attributes of the module behind ``node`` that change, with their new values."""
        if node.op != "call_module":
            return {}
        module = self.gm.get_submodule(str(node.target))
        new = layer_attributes(self, node, module)
        return {k: v for k, v in new.items() if getattr(module, k) != v}

    def _said_of_channels(self, node: fx.Node, module: nn.Module) -> dict[str, str]:
        """Which channels of the output of ``node`` stay, if some go: ``{"kept": "0-3,6"}``."""
        x = self.groups.found.get(node)
        if node.op != "call_module" or not isinstance(x, Labelled) or len(x.shape) < 2:
            return {}
        last = isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))
        stays = self.stays(x, len(x.shape) - 1 if last else 1)
        return {} if stays.all() else {"kept": _ranges(np.flatnonzero(stays).tolist())}

    def input_sizes(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of the first argument of ``node``, before and after."""
        x = self.groups.found[first_input(node)]
        return x.shape, self.groups.sizes(x, self.kept)

    # ------------------------------------------------------------------------------------------------- arguments
    def _arguments(self, node: fx.Node) -> Call | None:
        """The call with the sizes that it needs afterwards, or ``None`` if it stays as it is."""
        call = resized_call(self, node)
        if call is None or (call.target, call.args, call.kwargs) == (node.target, node.args, dict(node.kwargs)):
            return None
        return call

    def _as_nodes(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with nodes made for the numbers that still have to be worked out."""

        def make(value: Any) -> Any:
            if not isinstance(value, Scaled):
                return value
            with node.graph.inserting_before(node):
                product = node.graph.call_function(operator.mul, (value.node, value.by.numerator))
                return node.graph.call_function(operator.floordiv, (product, value.by.denominator))

        return tuple(_map_values(a, make) for a in args)

    def fitted(self, given: Any, size: int) -> Any:
        """``given``, a number or a node, so that it is ``size``."""
        if isinstance(given, fx.Node):
            now = self._numbers.of(given)
            return given if now == size or not now else Scaled(given, Fraction(size, now))
        return given if given == -1 else size

    def out(self, node: fx.Node) -> Any:
        """What is labelled in the value of ``node``."""
        return self.groups.found[node]

    def new_sizes(self, x: Labelled) -> tuple[int, ...]:
        """The shape of ``x`` afterwards."""
        return self.groups.sizes(x, self.kept)

    def stays(self, x: Labelled, dim: int) -> np.ndarray:
        """Which indices of ``x`` along ``dim`` stay."""
        m = x.about(dim)
        if m is None:
            return np.ones(x.shape[dim], dtype=np.bool_)
        along = self.groups.along(m.ids, dim, self.kept)
        return along if len(along) == x.shape[dim] else np.ones(x.shape[dim], dtype=np.bool_)


class _Numbers:
    """The values that the integers of a graph will have afterwards."""

    def __init__(self, surgery: Surgery) -> None:
        self.surgery = surgery
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, an integer or a shape; a shape for a tensor."""
        if node not in self._known:
            self._known[node] = self._work_out(node)
        return self._known[node]

    def _work_out(self, node: fx.Node) -> Any:
        found = self.surgery.groups.found[node]
        if isinstance(found, Labelled):
            return torch.Size(self.surgery.new_sizes(found))
        if not isinstance(found, (int, torch.Size)) or isinstance(found, bool) or node.op == "placeholder":
            return found
        args: tuple[Any, ...] = tuple(fx.node.map_arg(a, self.of) for a in node.args)
        if name_of_call(node) == "size":
            dim = argument(node, 1, "dim")
            return args[0] if dim is None else args[0][dim]
        if node.target is getattr:
            return args[0] if args[1] == "shape" else found
        if callable(node.target) and not any(isinstance(a, torch.Size) for a in args[1:]):
            return node.target(*args, **node.kwargs)
        return found


def _laid_out_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``value`` in channels-last memory if ``tensor`` is."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return value
    return value.contiguous(memory_format=layout)


def _map_values(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map_values(v, change) for v in value)
    return change(value)


def _tensors(target: Any) -> list[torch.Tensor]:
    if isinstance(target, torch.Tensor):
        return [target]
    return [*target.parameters(), *target.buffers()] if isinstance(target, nn.Module) else []


def _sizes(module: nn.Module, new: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{k}_before": _plain(getattr(module, k)) for k in new} | {f"{k}_after": _plain(v) for k, v in new.items()}


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending ``numbers`` as text: ``0-3,6``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, part)) for part in found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
