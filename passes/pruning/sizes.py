"""What follows from fewer channels: attributes of layers, and sizes among the arguments of calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Labelled
from fxcompress.matching import argument, name_of_call
from fxcompress.modules import GroupedLinear, ScaledDotProductAttention

__all__ = ["Call", "Scaled", "Sizes", "first_input", "layer_attributes", "resized_call"]

Mask = npt.NDArray[np.bool_]


class Sizes(Protocol):
    """Answers about sizes once the channels are gone."""

    gm: fx.GraphModule

    def new_shape(self, tensor: torch.Tensor) -> tuple[int, ...]: ...

    def new_sizes(self, x: Labelled) -> tuple[int, ...]: ...

    def input_sizes(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]: ...

    def out(self, node: fx.Node) -> Any: ...

    def stays(self, x: Labelled, dim: int) -> Mask: ...

    def fitted(self, given: Any, size: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A node whose value is to be multiplied."""

    node: fx.Node
    by: Fraction


@dataclasses.dataclass(frozen=True)
class Call:
    """Target and arguments of a call; numbers that have to be worked out as :class:`Scaled`."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def first_input(node: fx.Node) -> Any:
    """The first argument, by position or by whatever name."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()))


def layer_attributes(sizes: Sizes, node: fx.Node, module: nn.Module) -> dict[str, Any]:
    """Attributes of the ``module`` that ``node`` calls, with the values they must have."""
    for kinds, rule in _LAYERS:
        if isinstance(module, kinds):
            return rule(sizes, node, module)
    return {}


def resized_call(sizes: Sizes, node: fx.Node) -> Call | None:
    """The call that ``node`` must make, or ``None`` if no size is among its arguments."""
    if node.op == "call_module":
        attention = isinstance(sizes.gm.get_submodule(str(node.target)), ScaledDotProductAttention)
        return _attention(sizes, node) if attention else None
    if node.op not in ("call_function", "call_method"):
        return None
    rule = _CALLS.get(name_of_call(node).rstrip("_"))
    return None if rule is None else rule(sizes, node)


# ------------------------------------------------------------------------------------------------- layers
def _convolution(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    """Weights are (out, in / groups, ...), transposed (in, out / groups, ...)."""
    new, dim = sizes.new_shape(m.weight), 1 - m.weight.dim()  # counted from the back, as there may be no batch
    into, out = sizes.input_sizes(node)[1][dim], sizes.new_sizes(sizes.out(node))[dim]
    return {"in_channels": into, "out_channels": out, "groups": (out if m.transposed else into) // new[1]}


def _group_norm(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    stays = sizes.stays(sizes.out(first_input(node)), 1)
    return {"num_channels": int(stays.sum()), "num_groups": _groups_left(stays, m.num_groups)}


def _groups_left(stays: Mask, groups: int) -> int:
    """How many groups are left: fewer if whole ones have gone, all if the same part of each has."""
    rows = stays.reshape(groups, -1)
    return int(rows[:, 0].sum()) if (rows == rows[:, :1]).all() else groups


def _layer_norm(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    return {"normalized_shape": tuple(sizes.input_sizes(node)[1][-len(m.normalized_shape) :])}


def _unflatten(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    out = sizes.out(node)
    start = int(m.dim) % len(sizes.input_sizes(node)[0])
    new = sizes.new_sizes(out)[start : start + len(m.unflattened_size)]
    pairs = zip(m.unflattened_size, new, strict=True)
    return {"unflattened_size": type(m.unflattened_size)(g if g == -1 else n for g, n in pairs)}


def _features(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    tensor = m.weight if m.weight is not None else m.running_mean
    return {} if tensor is None else {"num_features": sizes.new_shape(tensor)[0]}


def _linear(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    out, into = sizes.new_shape(m.weight)
    return {"in_features": into, "out_features": out}


def _grouped_linear(sizes: Sizes, node: fx.Node, m: Any) -> dict[str, Any]:
    (out, width), into = sizes.new_shape(m.weight), sizes.input_sizes(node)[1][-1]
    return {"in_features": into, "out_features": out, "groups": into // width}


_LAYERS: Sequence[tuple[Any, Callable[[Sizes, fx.Node, Any], dict[str, Any]]]] = (
    (nn.Linear, _linear),
    (GroupedLinear, _grouped_linear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.modules.batchnorm._NormBase, _features),
    (nn.Embedding, lambda s, n, m: {"embedding_dim": s.new_shape(m.weight)[1]}),
    (nn.PReLU, lambda s, n, m: {"num_parameters": s.new_shape(m.weight)[0]}),
    (nn.Unflatten, _unflatten),
)


# ------------------------------------------------------------------------------------------------- calls
def _call(node: fx.Node, args: Sequence[Any] | None = None) -> Call:
    return Call(node.target, tuple(node.args if args is None else args), dict(node.kwargs))


def _with_argument(node: fx.Node, position: int, name: str, value: Any) -> Call:
    if len(node.args) > position:
        return _call(node, (*node.args[:position], value, *node.args[position + 1 :]))
    return Call(node.target, tuple(node.args), {**node.kwargs, name: value})


def _view(sizes: Sizes, node: fx.Node) -> Call:
    """Sizes, one for each dimension of the result."""
    new, old = sizes.new_sizes(sizes.out(node)), sizes.out(node).shape
    args: tuple[Any, ...] = node.args

    def fit(given: Sequence[Any]) -> list[Any]:
        pairs = zip(given, new, old, strict=True)
        return [sizes.fitted(g, n) if n != o or isinstance(g, fx.Node) else g for g, n, o in pairs]

    for name in ("shape", "size"):
        if name in node.kwargs:
            return _with_argument(node, len(args), name, tuple(fit(argument(node, len(args), name))))
    if len(args) == 2 and isinstance(args[1], (tuple, list)):
        return _call(node, (args[0], type(args[1])(fit(args[1]))))
    return _call(node, (args[0], *fit(args[1:])))


def _unflatten_call(sizes: Sizes, node: fx.Node) -> Call:
    given = argument(node, 2, "sizes")
    start = int(argument(node, 1, "dim")) % len(sizes.out(first_input(node)).shape)
    new = sizes.new_sizes(sizes.out(node))[start : start + len(given)]
    fitted = tuple(sizes.fitted(g, n) for g, n in zip(given, new, strict=True))
    return _with_argument(node, 2, "sizes", fitted)


def _split(sizes: Sizes, node: fx.Node) -> Call:
    """Becomes a split into a list of sizes where the parts differ from what the call would give."""
    parts = sizes.out(node)
    dim = int(argument(node, 2, "dim", 0)) % len(sizes.out(first_input(node)).shape)
    new, old = [sizes.new_sizes(p)[dim] for p in parts], [p.shape[dim] for p in parts]
    if new == old:
        return _call(node)
    name = name_of_call(node)
    if name in ("chunk", "unsafe_chunk"):
        each = -(-sum(new) // len(new))
        if new == [min(each, sum(new) - i * each) for i in range(len(new))]:
            return _call(node)
    target = "split" if node.op == "call_method" else torch.split
    return Call(target, (first_input(node), new, dim), {})


def _getitem(sizes: Sizes, node: fx.Node) -> Call:
    x, given = sizes.out(first_input(node)), argument(node, 1, "index")
    if not isinstance(x, Labelled):
        return _call(node)
    index = given if isinstance(given, tuple) else (given,)
    new: list[Any] = []
    dim, taken = 0, sum(_dims_of(i) for i in index)
    for i in index:
        if i is Ellipsis:
            dim += len(x.shape) - taken
        elif isinstance(i, slice):
            i = _slice(sizes, x, dim, i)
        elif isinstance(i, int) and not isinstance(i, bool):
            i = _position(sizes.stays(x, dim), i)
        new.append(i)
        dim += _dims_of(i)
    return _call(node, (node.args[0], tuple(new) if isinstance(given, tuple) else new[0], *node.args[2:]))


def _dims_of(i: Any) -> int:
    """How many dimensions an item of an index is about. A mask over several counts as one; nothing is removed then."""
    return 0 if i is None or i is Ellipsis or isinstance(i, bool) else 1


def _slice(sizes: Sizes, x: Labelled, dim: int, given: slice) -> slice:
    stays = sizes.stays(x, dim)
    if stays.all():
        return given
    bounds = [b if b is None or isinstance(b, fx.Node) else _position(stays, b) for b in (given.start, given.stop)]
    return slice(bounds[0], bounds[1], given.step)


def _position(stays: Mask, index: int) -> int:
    """Where position ``index`` is afterwards."""
    if stays.all():
        return index
    index = index if index >= 0 else max(index + len(stays), 0)
    return int(stays[:index].sum())


def _narrow(sizes: Sizes, node: fx.Node) -> Call:
    x, dim, start = sizes.out(first_input(node)), argument(node, 1, "dim"), argument(node, 2, "start")
    stays = sizes.stays(x, dim % len(x.shape))
    if stays.all():
        return _call(node)
    length = sizes.new_sizes(sizes.out(node))[dim]
    return Call(node.target, (first_input(node), dim, _position(stays, start), length), {})


def _select(sizes: Sizes, node: fx.Node) -> Call:
    x, index = sizes.out(first_input(node)), argument(node, 2, "index")
    if not isinstance(index, int):
        return _call(node)
    stays = sizes.stays(x, int(argument(node, 1, "dim")) % len(x.shape))
    return _with_argument(node, 2, "index", _position(stays, index))


def _attention(sizes: Sizes, node: fx.Node) -> Call:
    """The scale is one over the root of the width that a head had."""
    x = sizes.out(argument(node, 0, "query"))
    if sizes.new_sizes(x)[-1] == x.shape[-1] or len(node.args) > 6 or node.kwargs.get("scale") is not None:
        return _call(node)
    return _with_argument(node, len(node.args), "scale", 1 / math.sqrt(x.shape[-1]))


def _normalized_shape(sizes: Sizes, node: fx.Node) -> Call:
    given = tuple(argument(node, 1, "normalized_shape"))
    new = tuple(sizes.input_sizes(node)[1][-len(given) :])
    return _call(node) if given == new else _with_argument(node, 1, "normalized_shape", new)


def _groups_argument(position: int, name: str, channels: int) -> Callable[[Sizes, fx.Node], Call]:
    """The number of groups of a functional group norm or convolution, of which whole ones may have gone."""

    def rule(sizes: Sizes, node: fx.Node) -> Call:
        groups, x = argument(node, position, name, 1), sizes.out(first_input(node))
        if isinstance(groups, fx.Node):  # a group for each example: nothing of them goes
            return _call(node)
        left = _groups_left(sizes.stays(x, channels % len(x.shape)), groups)
        return _call(node) if left == groups else _with_argument(node, position, name, left)

    return rule


_CALLS: dict[str, Callable[[Sizes, fx.Node], Call]] = {
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
    **{f"{kind}{i}d": _groups_argument(6, "groups", -i - 1) for kind in ("conv", "conv_transpose") for i in (1, 2, 3)},
}
