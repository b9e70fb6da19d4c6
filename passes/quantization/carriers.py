"""What operations do to channels that are scaled: which element of a result follows which channel.

Each channel that something writes has a number (an atom, ``analysis/channels/atoms.py``). A tensor has an array of
numbers, of its rank, with size 1 along dimensions along which they do not change; dividing a channel by s > 0 divides
all elements of its number. An operation carries that if it is positively homogeneous in its input, ``f(x / s) =
f(x) / s``, element by element or within one number: then the result has numbers too, and of what it combines numbers
are united. What only moves elements is run on the numbers themselves. Everything else freezes what it reads.

A value whose channels cannot be scaled has no numbers (``None``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress import matching
from fxcompress.analysis.channels.atoms import FIXED, Atoms, Ids
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.editing import is_inplace
from fxcompress.modules import ScaledDotProductAttention
from fxcompress.pass_base import PassContext

__all__ = ["Carriers", "Numbers", "along"]

_QUERIES = frozenset("size dim numel is_floating_point ndimension __len__ len".split())
_ASKED = frozenset("shape dtype device ndim layout is_cuda requires_grad".split())
_MOVES = frozenset(
    "view view_as reshape reshape_as flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze getitem narrow select expand expand_as chunk split split_with_sizes tensor_split unbind cat concat "
    "concatenate stack hstack vstack roll flip repeat tile pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_ALONE = frozenset(
    "relu leaky_relu abs absolute neg negative positive contiguous clone detach to float half double bfloat16 type "
    "type_as dropout dropout1d dropout2d dropout3d".split()
)
_ALONE_MODULES = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_SUMS = frozenset("add sub subtract maximum minimum iadd isub".split())
_PRODUCTS = frozenset("mul multiply div divide true_divide truediv imul itruediv".split())
_REDUCTIONS = frozenset("mean sum amax amin".split())
_POOLS = frozenset(f"{a}{b}_pool{d}d" for a in ("", "adaptive_") for b in ("avg", "max") for d in (1, 2, 3))
_SPATIAL = tuple(
    (getattr(nn, f"{name}{d}d"), d)
    for d in (1, 2, 3)
    for name in ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad", "ReflectionPad",
                 "ReplicationPad", "CircularPad")
)  # fmt: skip
_UPSAMPLING = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """Of a tensor.

    Attributes:
        ids: of its rank; size 1 where they do not change.
        shape: of the tensor.
        is_parameter: whether it is a parameter, or one that was moved about.
    """

    ids: Ids
    shape: tuple[int, ...]
    is_parameter: bool = False


def along(ids: Ids, axis: int, rank: int) -> Ids:
    """A row of numbers as those of a tensor of ``rank`` dimensions whose dimension ``axis`` they run along."""
    return ids.reshape([-1 if d == axis else 1 for d in range(rank)])


class Carriers:
    """The rules. Values are numbers, ``None`` or containers of these.

    Args:
        context: of the graph.
        atoms: what the numbers are of.
    """

    def __init__(self, context: PassContext, atoms: Atoms) -> None:
        self._context = context
        self._atoms = atoms
        self._values: dict[fx.Node, Any] = {}

    # ------------------------------------------------------------------------------------------------- values
    def value(self, node: Any) -> Any:
        """The numbers that were set for ``node``."""
        return self._values.get(node) if isinstance(node, fx.Node) else None

    def set(self, node: fx.Node, value: Any) -> None:
        """Say what ``node`` has."""
        self._values[node] = value

    def freeze(self, value: Any, reason: str) -> None:
        """Scale nothing of ``value``, numbers or a container of some."""
        for leaf in _leaves(value):
            self._atoms.freeze(leaf.ids.ravel(), reason)

    def read(self, node: fx.Node) -> list[Any]:
        """What the inputs of ``node`` have."""
        return [found for n in node.all_input_nodes if (found := self.value(n)) is not None]

    def tied(self, numbers: Numbers, axes: Sequence[int]) -> Ids:
        """The numbers with those along ``axes`` united, and size 1 there."""
        ids = numbers.ids
        for axis in axes:
            self._atoms.tie(ids, axis, "it is joined with something that cannot be scaled")
            ids = np.take(ids, [0], axis=axis)
        return ids

    # ------------------------------------------------------------------------------------------------- one node
    def carry(self, node: fx.Node) -> None:
        """Set the numbers of ``node``, which is no layer, from those of what it reads."""
        read = self.read(node)
        if not _leaves(read) or self._asks(node):
            return
        rule = self._rule(node)
        found = None if rule is None else rule(node)
        if isinstance(found, str) or found is None:
            what = matching.describe(self._context.gm, node)
            which = "which does not carry the scaling of a channel" if found is None else found
            self.freeze(read, f"it goes into {what}, {which}")
        elif self._is_real(node):
            self.set(node, found)
        else:
            self.freeze(read, f"it goes into {matching.describe(self._context.gm, node)}, which gives other numbers")

    def _asks(self, node: fx.Node) -> bool:
        return matching.is_call(node, _QUERIES) or (node.target is getattr and node.args[1] in _ASKED)

    def _is_real(self, node: fx.Node) -> bool:
        specs = pytree.tree_leaves(self._context.shapes[node], is_leaf=lambda v: isinstance(v, TensorSpec))
        return all(not isinstance(s, TensorSpec) or s.dtype.is_floating_point for s in specs)

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        if node.kwargs.get("out") is not None or node.op == "output":
            return None
        if is_inplace(node) and not self._writes_to_its_own(node):
            return None
        if node.op == "call_module":
            return self._rule_of_module(node)
        if node.target is getattr:
            return self._move if node.args[1] in ("T", "mT") else None
        name = matching.name_of_call(node)
        name = name[:-1] if name.endswith("_") else name
        table = [
            (_MOVES, self._move), (_ALONE, self._alone), (_SUMS, self._sum), (_PRODUCTS, self._product),
            (_REDUCTIONS, self._reduce), (_POOLS, self._pool), (("interpolate",), self._resize), (("pad",), self._pad),
            (("matmul", "bmm"), self._matmul), (("scaled_dot_product_attention",), self._attend),
            (("clamp", "clamp_min"), self._clamp),
        ]  # fmt: skip
        return next((rule for names, rule in table if name in names), None)

    def _writes_to_its_own(self, node: fx.Node) -> bool:
        """Whether an operation in place leaves every element of what it writes to with its number: other readers of
        that, and of what it is a view of, see what has been written."""
        written = self.value(matching.tensor_input(node))
        if not isinstance(written, Numbers) or self._atoms.are_frozen(written.ids.ravel()):
            return False
        return written.shape == self._shape(node) and matching.name_of_call(node).rstrip("_") not in _MOVES

    def _rule_of_module(self, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        module = self._context.module(node)
        if module is None or matching.override_of(module) is not None:
            return None
        kind = type(module)
        if kind in _MOVING_MODULES:
            return self._move
        if kind in _ALONE_MODULES:
            return self._alone
        if kind is ScaledDotProductAttention:
            return self._attend
        if kind in _UPSAMPLING:
            return self._resize
        dimensions = dict(_SPATIAL).get(kind)
        if dimensions is None or getattr(module, "return_indices", False):
            return None
        return lambda n: self._spatial(n, dimensions)

    # ------------------------------------------------------------------------------------------------- the rules
    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        spec = self._context.shapes[node]
        return spec.shape if isinstance(spec, TensorSpec) else None

    def _first(self, node: fx.Node) -> Numbers | None:
        """What the first argument has, if nothing else has any."""
        value = self.value(matching.tensor_input(node))
        alone = isinstance(value, Numbers) and len(_leaves(self.read(node))) == 1
        return value if alone else None

    def _move(self, node: fx.Node) -> Any:
        module = self._context.module(node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._stand_in)
        if any(isinstance(a, _Unknown) for a in pytree.tree_leaves((args, kwargs))):
            return "by an index that is computed"
        try:
            if module is not None:
                moved = module(*args, **kwargs)
            elif node.op == "call_method":
                moved = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                moved = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            return f"which does not move integers ({error})"
        parameter = all(leaf.is_parameter for leaf in _leaves(self.read(node)))
        return pytree.tree_map_only(torch.Tensor, lambda t: _compact(t, parameter), moved)

    def _stand_in(self, node: fx.Node) -> Any:
        """The numbers of a value in full, as a tensor; zeros where there are none, which stand for what is fixed."""
        value, spec = self.value(node), self._context.shapes[node]
        if value is None and isinstance(spec, TensorSpec):
            return _Unknown() if not spec.dtype.is_floating_point else torch.full((), FIXED).expand(spec.shape)
        if value is None:
            return pytree.tree_map_only(TensorSpec, lambda s: torch.full((), FIXED).expand(s.shape), spec)
        return pytree.tree_map_only(Numbers, lambda v: torch.from_numpy(v.ids).expand(v.shape), value)

    def _alone(self, node: fx.Node) -> Any:
        return self._first(node)

    def _clamp(self, node: fx.Node) -> Any:
        low, high = matching.argument(node, 1, "min"), matching.argument(node, 2, "max")
        harmless = low in (None, 0, -math.inf) and high in (None, 0, math.inf)
        return self._first(node) if harmless else "whose bound is not zero"

    def _operands(self, node: fx.Node) -> tuple[Any, Any] | None:
        """Both operands, values with live numbers as these; what is frozen already has none."""
        if len(node.args) != 2:
            return None
        both = [self.value(a) if isinstance(a, fx.Node) else a for a in node.args]
        return tuple(  # type: ignore[return-value]
            None if isinstance(v, Numbers) and self._atoms.are_frozen(v.ids.ravel()) else v for v in both
        )

    def _sum(self, node: fx.Node) -> Any:
        both = self._operands(node)
        if both is None:
            return None
        if isinstance(both[0], Numbers) and isinstance(both[1], Numbers):
            rank = max(len(both[0].shape), len(both[1].shape))
            a, b = (_of_rank(v, rank) for v in both)
            self._atoms.unite(a, b, "it is added to something that cannot be scaled")
            return self._result(node, np.maximum(a, b), both[0].is_parameter and both[1].is_parameter)
        other = both[1] if isinstance(both[0], Numbers) else both[0]
        one = both[0] if isinstance(both[0], Numbers) else both[1]
        if isinstance(one, Numbers) and isinstance(other, (int, float)) and other == 0:
            return one
        return "where it is added to something that cannot be scaled"

    def _product(self, node: fx.Node) -> Any:
        both = self._operands(node)
        if both is None or node.kwargs:
            return None
        a, b = both
        if isinstance(a, Numbers) and isinstance(b, Numbers):
            if a.is_parameter == b.is_parameter:
                return "where it is multiplied by something that is scaled too"
            parameter = a if a.is_parameter else b
            self.freeze(parameter, "it is multiplied by something that is scaled itself")
            a, b = (None if v is parameter else v for v in both)
        divides = "div" in matching.name_of_call(node)
        if isinstance(b, Numbers) and divides:
            return "where something is divided by it"
        scaled = a if isinstance(a, Numbers) else b
        if not isinstance(scaled, Numbers):
            return None
        return self._result(node, scaled.ids, scaled.is_parameter and len(node.all_input_nodes) == 1)

    def _result(self, node: fx.Node, ids: Ids, is_parameter: bool = False) -> Numbers | None:
        shape = self._shape(node)
        if shape is None or ids.ndim > len(shape):
            return None
        return Numbers(ids.reshape((1,) * (len(shape) - ids.ndim) + ids.shape), shape, is_parameter)

    def _reduce(self, node: fx.Node) -> Any:
        first, shape = self._first(node), self._shape(node)
        dims = matching.argument(node, 1, "dim")
        dims = (dims,) if isinstance(dims, int) else dims
        if first is None or shape is None or not isinstance(dims, (tuple, list)) or not dims:
            return None
        rank = len(first.shape)
        axes = [d % rank for d in dims]
        ids = self.tied(first, axes)
        kept = len(shape) == rank
        return Numbers(ids if kept else ids.squeeze(tuple(axes)), shape)

    def _spatial(self, node: fx.Node, dimensions: int) -> Any:
        """An operation along the last ``dimensions`` dimensions."""
        first, shape = self._first(node), self._shape(node)
        if first is None or shape is None or len(shape) != len(first.shape):
            return None
        rank = len(shape)
        return Numbers(self.tied(first, range(rank - dimensions, rank)), shape)

    def _pool(self, node: fx.Node) -> Any:
        if matching.argument(node, 6, "return_indices") is True or node.kwargs.get("return_indices"):
            return None
        return self._spatial(node, int(matching.name_of_call(node)[-2]))

    def _resize(self, node: fx.Node) -> Any:
        shape = self._shape(node)
        return None if shape is None else self._spatial(node, len(shape) - 2)

    def _pad(self, node: fx.Node) -> Any:
        first, shape = self._first(node), self._shape(node)
        pads = matching.argument(node, 1, "pad")
        mode, value = matching.argument(node, 2, "mode", "constant"), matching.argument(node, 3, "value")
        if first is None or shape is None or not isinstance(pads, (tuple, list)):
            return None
        if mode != "constant":
            return self._spatial(node, len(pads) // 2)
        if value not in (None, 0) or not all(isinstance(p, int) and p >= 0 for p in pads):
            return "which pads with something else than zeros"
        ids = first.ids
        for number in range(len(pads) // 2):
            axis = len(shape) - 1 - number
            before, after = pads[2 * number], pads[2 * number + 1]
            if ids.shape[axis] > 1:  # zeros are scaled by whatever one likes
                sizes = [[*ids.shape[:axis], p, *ids.shape[axis + 1 :]] for p in (before, after)]
                free = [self._atoms.new(math.prod(size)).reshape(size) for size in sizes]
                ids = np.concatenate([free[0], ids, free[1]], axis)
        return Numbers(ids, shape)

    def _matmul(self, node: fx.Node) -> Any:
        both, shape = self._operands(node), self._shape(node)
        if both is None or shape is None or len(shape) < 2 or node.kwargs:
            return None
        left, right = both
        if isinstance(left, Numbers) and isinstance(right, Numbers):
            return "where it is multiplied by something that is scaled too"
        scaled = left if isinstance(left, Numbers) else right
        if not isinstance(scaled, Numbers) or len(scaled.shape) < 2:
            return None
        summed = len(scaled.shape) - (1 if scaled is left else 2)
        return self._result(node, self.tied(scaled, [summed]))

    def _attend(self, node: fx.Node) -> Any:
        value, shape = self.value(matching.argument(node, 2, "value")), self._shape(node)
        if not isinstance(value, Numbers) or node.kwargs.get("enable_gqa") or shape is None:
            return None
        others = [n for n in node.all_input_nodes if self.value(n) is not value]
        if matching.argument(node, 2, "value") in (
            matching.argument(node, i, n) for i, n in ((0, "query"), (1, "key"))
        ):
            return "which takes scores from it too"
        self.freeze([self.value(n) for n in others], "it goes into the scores of an attention")
        return self._result(node, self.tied(value, [len(value.shape) - 2]))


class _Unknown:
    """Stands for a tensor whose elements matter and are not known."""


def _leaves(value: Any) -> list[Numbers]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Numbers)]


def _of_rank(numbers: Numbers, rank: int) -> Ids:
    return numbers.ids.reshape((1,) * (rank - len(numbers.shape)) + numbers.ids.shape)


def _compact(full: torch.Tensor, is_parameter: bool) -> Numbers:
    shape = tuple(full.shape)
    if full.numel():
        for axis in range(full.dim()):
            first = full.narrow(axis, 0, 1)
            if bool((full == first).all()):
                full = first
    return Numbers(full.contiguous().numpy(), shape, is_parameter)
