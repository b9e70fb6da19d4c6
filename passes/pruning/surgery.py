"""Removing channels from a graph: slices of parameters, attributes of layers, sizes among the arguments of calls."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Binding, ChannelGroups, Labelled
from fxcompress.editing import get_attribute
from fxcompress.matching import name_of_call
from fxcompress.modules import ScaledDotProductAttention

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
                said = _sizes(target, attributes)
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

    def _new_shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
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
        for kinds, rule in _LAYERS:
            if isinstance(module, kinds):
                new = rule(self, node, module)
                return {k: v for k, v in new.items() if getattr(module, k) != v}
        return {}

    def input_sizes(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of the first argument of ``node``, before and after."""
        x = self.groups.found[node.args[0] if node.args else next(iter(node.kwargs.values()))]  # type: ignore[index]
        return x.shape, self.groups.sizes(x, self.kept)

    # ------------------------------------------------------------------------------------------------- arguments
    def _arguments(self, node: fx.Node) -> _Call | None:
        """The call with the sizes that it needs afterwards, or ``None`` if it stays as it is."""
        if node.op == "call_module":
            if not isinstance(self.gm.get_submodule(str(node.target)), ScaledDotProductAttention):
                return None
            rule: Any = _attention
        else:
            rule = _CALLS.get(name_of_call(node).rstrip("_")) if node.op in ("call_function", "call_method") else None
        if rule is None:
            return None
        call: _Call = rule(self, node)
        same = call.target == node.target and call.args == node.args and call.kwargs == dict(node.kwargs)
        return None if same else call

    def _as_nodes(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with nodes made for the numbers that still have to be worked out."""

        def make(value: Any) -> Any:
            if not isinstance(value, _Scaled):
                return value
            with node.graph.inserting_before(node):
                product = node.graph.call_function(operator.mul, (value.node, value.by.numerator))
                return node.graph.call_function(operator.floordiv, (product, value.by.denominator))

        return tuple(_map_values(a, make) for a in args)

    def fitted(self, given: Any, size: int) -> Any:
        """``given``, a number or a node, so that it is ``size``."""
        if isinstance(given, fx.Node):
            now = self._numbers.of(given)
            return given if now == size or not now else _Scaled(given, Fraction(size, now))
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


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A node whose value is to be multiplied."""

    node: fx.Node
    by: Fraction


@dataclasses.dataclass(frozen=True)
class _Call:
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


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
        name = name_of_call(node)
        args = fx.node.map_arg(node.args, self.of)
        if name == "size":
            dim = args[1] if len(args) > 1 else node.kwargs.get("dim")
            return args[0] if dim is None else args[0][dim]
        if node.target is getattr:
            return args[0] if args[1] == "shape" else found
        if node.op == "call_function" and not any(isinstance(a, torch.Size) for a in args[1:]):
            return node.target(*args, **node.kwargs)  # type: ignore[operator]
        return found


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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------- layers
def _convolution(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    """Weights are (out, in / groups, ...), transposed (in, out / groups, ...)."""
    new = surgery._new_shape(m.weight)
    first, groups = (m.in_channels if m.transposed else m.out_channels), m.groups
    if groups > 1:  # either whole groups have gone, or the same part of every group
        whole = m.weight.shape[1] == new[1] and new[0] != m.weight.shape[0] and _loses_groups(m)
        groups = new[0] * groups // first if whole else groups
    sizes = (new[1] * groups, new[0]) if not m.transposed else (new[0], new[1] * groups)
    return {"in_channels": sizes[0], "out_channels": sizes[1], "groups": groups}


def _loses_groups(m: Any) -> bool:
    return bool(m.groups >= m.in_channels // m.groups)


def _group_norm(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    channels = surgery.input_sizes(node)[1][1]
    width = m.num_channels // m.num_groups
    return {"num_channels": channels, "num_groups": channels // width if m.num_groups >= width else m.num_groups}


def _layer_norm(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    return {"normalized_shape": tuple(surgery.input_sizes(node)[1][-len(m.normalized_shape) :])}


def _unflatten(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    out = surgery.out(node)
    start = int(m.dim) % len(surgery.input_sizes(node)[0])
    sizes = surgery.new_sizes(out)[start : start + len(m.unflattened_size)]
    pairs = zip(m.unflattened_size, sizes, strict=True)
    return {"unflattened_size": type(m.unflattened_size)(given if given == -1 else new for given, new in pairs)}


def _features(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    tensor = m.weight if m.weight is not None else m.running_mean
    return {} if tensor is None else {"num_features": surgery._new_shape(tensor)[0]}


def _linear(surgery: Surgery, node: fx.Node, m: Any) -> dict[str, Any]:
    out, into = surgery._new_shape(m.weight)
    return {"in_features": into, "out_features": out}


_LAYERS: Sequence[tuple[Any, Callable[[Surgery, fx.Node, Any], dict[str, Any]]]] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.modules.batchnorm._NormBase, _features),
    (nn.Embedding, lambda s, n, m: {"embedding_dim": s._new_shape(m.weight)[1]}),
    (nn.PReLU, lambda s, n, m: {"num_parameters": s._new_shape(m.weight)[0]}),
    (nn.Unflatten, _unflatten),
)


# ------------------------------------------------------------------------------------------------- calls
def _call(node: fx.Node, args: Sequence[Any] | None = None, target: Any = None, **kwargs: Any) -> _Call:
    return _Call(target or node.target, tuple(node.args if args is None else args), {**node.kwargs, **kwargs})


def _view(surgery: Surgery, node: fx.Node) -> _Call:
    """Sizes, one for each dimension of the result."""
    new, old = surgery.new_sizes(surgery.out(node)), surgery.out(node).shape

    def fit(given: Sequence[Any]) -> list[Any]:
        pairs = zip(given, new, old, strict=True)
        return [surgery.fitted(g, n) if n != o or isinstance(g, fx.Node) else g for g, n, o in pairs]

    for name in ("shape", "size"):
        if name in node.kwargs:
            return _call(node, **{name: tuple(fit(node.kwargs[name]))})
    if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)):
        return _call(node, (node.args[0], type(node.args[1])(fit(node.args[1]))))
    return _call(node, (node.args[0], *fit(node.args[1:])))


def _unflatten_call(surgery: Surgery, node: fx.Node) -> _Call:
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("sizes")
    x, out = surgery.out(node.args[0]), surgery.out(node)  # type: ignore[arg-type]
    start = int(node.args[1] if len(node.args) > 1 else node.kwargs["dim"]) % len(x.shape)  # type: ignore[call-overload]
    new = surgery.new_sizes(out)[start : start + len(given)]  # type: ignore[arg-type]
    sizes = tuple(surgery.fitted(g, n) for g, n in zip(given, new, strict=True))  # type: ignore[arg-type]
    if len(node.args) > 2:
        return _call(node, (*node.args[:2], sizes))
    return _call(node, sizes=sizes)


def _split(surgery: Surgery, node: fx.Node) -> _Call:
    """Becomes a split into a list of sizes where the parts differ from what the call would give."""
    parts = surgery.out(node)
    x = surgery.out(node.args[0])  # type: ignore[arg-type]
    position = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim = int(position) % len(x.shape)  # type: ignore[call-overload]
    new, old = [surgery.new_sizes(p)[dim] for p in parts], [p.shape[dim] for p in parts]
    if new == old:
        return _call(node)
    name = name_of_call(node)
    if name in ("chunk", "unsafe_chunk"):
        each = -(-sum(new) // len(new))
        if new == [min(each, sum(new) - i * each) for i in range(len(new))]:
            return _call(node)
    target = "split" if node.op == "call_method" else torch.split
    return _Call(target, (node.args[0], new, dim), {})


def _getitem(surgery: Surgery, node: fx.Node) -> _Call:
    x = surgery.out(node.args[0])  # type: ignore[arg-type]
    if not isinstance(x, Labelled):
        return _call(node)
    given = node.args[1]
    index = given if isinstance(given, tuple) else (given,)
    dim, new = 0, []
    taken = sum(_dims_of(i, surgery) for i in index)
    for i in index:
        if i is Ellipsis:
            dim += len(x.shape) - taken
        elif isinstance(i, slice):
            i = _slice(surgery, x, dim, i)
        elif isinstance(i, int) and not isinstance(i, bool):
            i = _position(surgery.stays(x, dim), i)
        new.append(i)
        dim += _dims_of(i, surgery)
    return _call(node, (node.args[0], tuple(new) if isinstance(given, tuple) else new[0], *node.args[2:]))


def _dims_of(i: Any, surgery: Surgery) -> int:
    if i is None or i is Ellipsis or isinstance(i, bool):
        return 0
    if isinstance(i, fx.Node) and isinstance(found := surgery.out(i), Labelled):
        return len(found.shape) if i.meta.get("boolean") else 1
    return 1


def _slice(surgery: Surgery, x: Labelled, dim: int, given: slice) -> slice:
    stays = surgery.stays(x, dim)
    if stays.all():
        return given
    bounds = [b if b is None or isinstance(b, fx.Node) else _position(stays, b) for b in (given.start, given.stop)]
    return slice(bounds[0], bounds[1], given.step)


def _position(stays: np.ndarray, index: int) -> int:
    """Where position ``index`` is afterwards."""
    if stays.all():
        return index
    index = index if index >= 0 else max(index + len(stays), 0)
    return int(stays[:index].sum())


def _narrow(surgery: Surgery, node: fx.Node) -> _Call:
    x, out = surgery.out(node.args[0]), surgery.out(node)  # type: ignore[arg-type]
    dim = int(node.args[1]) % len(x.shape)  # type: ignore[call-overload]
    stays = surgery.stays(x, dim)
    if stays.all() or len(node.args) < 4:
        return _call(node)
    return _call(node, (*node.args[:2], _position(stays, node.args[2]), surgery.new_sizes(out)[dim]))  # type: ignore[arg-type]


def _select(surgery: Surgery, node: fx.Node) -> _Call:
    x = surgery.out(node.args[0])  # type: ignore[arg-type]
    if len(node.args) < 3 or not isinstance(node.args[2], int):
        return _call(node)
    dim = int(node.args[1]) % len(x.shape)  # type: ignore[call-overload]
    return _call(node, (*node.args[:2], _position(surgery.stays(x, dim), node.args[2])))


def _attention(surgery: Surgery, node: fx.Node) -> _Call:
    """The scale is one over the root of the width that a head had."""
    query = node.args[0] if node.args else node.kwargs["query"]
    x = surgery.out(query)  # type: ignore[arg-type]
    if surgery.new_sizes(x)[-1] == x.shape[-1] or len(node.args) > 6 or node.kwargs.get("scale") is not None:
        return _call(node)
    return _call(node, scale=1 / math.sqrt(x.shape[-1]))


def _normalized_shape(surgery: Surgery, node: fx.Node) -> _Call:
    given = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
    new = tuple(surgery.input_sizes(node)[1][-len(given) :])  # type: ignore[arg-type]
    if tuple(given) == new:  # type: ignore[arg-type]
        return _call(node)
    if len(node.args) > 1:
        return _call(node, (node.args[0], new, *node.args[2:]))
    return _call(node, normalized_shape=new)


def _groups_argument(position: int, name: str, channels: int) -> Callable[[Surgery, fx.Node], _Call]:
    """The number of groups of a functional group norm or convolution, of which whole ones may have gone."""

    def rule(surgery: Surgery, node: fx.Node) -> _Call:
        groups = node.args[position] if len(node.args) > position else node.kwargs.get(name, 1)
        before, after = surgery.input_sizes(node)
        width = before[channels] // groups  # type: ignore[operator]
        if groups == 1 or groups < width or before == after:  # type: ignore[operator]
            return _call(node)
        new = after[channels] // width
        if len(node.args) > position:
            return _call(node, (*node.args[:position], new, *node.args[position + 1 :]))
        return _call(node, **{name: new})

    return rule


_CALLS: dict[str, Callable[[Surgery, fx.Node], _Call]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _view),
    "unflatten": _unflatten_call,
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _split),
    "getitem": _getitem,
    "setitem": _getitem,
    "narrow": _narrow,
    "select": _select,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "group_norm": _groups_argument(1, "num_groups", 1),
    **{f"conv{i}d": _groups_argument(6, "groups", -i - 1) for i in (1, 2, 3)},
    **{f"conv_transpose{i}d": _groups_argument(6, "groups", -i - 1) for i in (1, 2, 3)},
}
