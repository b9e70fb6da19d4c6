"""Which dimensions of which activations have one size whatever the inputs, and which have each other's.

An example shows that two sizes agree once. That they always agree follows from the operations between them, by one rule
for each kind of operation; where there is no rule, a size counts as equal to nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxcompress import matching
from fxcompress.analysis.shapes import Shapes, TensorSpec

__all__ = ["Size", "Sizes", "reshape_arguments"]

Size = int | tuple[fx.Node, int]
"""A size that is always this number, or that of this dimension of this node. Equal values mean equal sizes."""

# Files of torch.nn.modules whose modules (but for those named) give a tensor of their input's shape.
_SHAPE_KEEPING_FILES = frozenset("activation batchnorm dropout instancenorm normalization".split())
_NOT_SHAPE_KEEPING = (nn.GLU, nn.MultiheadAttention)
_SHAPE_KEEPING_CALLS = frozenset(
    "relu relu_ relu6 gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh sigmoid tanh softplus "
    "softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout batch_norm "
    "layer_norm group_norm instance_norm contiguous clone detach neg exp log sqrt rsqrt abs to float double half "
    "bfloat16 type type_as".split()
)
_ELEMENTWISE_CALLS = frozenset("add sub mul div truediv add_ sub_ mul_ div_ iadd isub imul itruediv".split())
_UNPOOLING = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
_Dims = tuple[Size, ...]


class Sizes:
    """The sizes of every tensor in ``gm``, from one walk along the graph.

    Args:
        gm: the graph.
        shapes: of a run on some example.
    """

    def __init__(self, gm: fx.GraphModule, shapes: Shapes) -> None:
        self._gm = gm
        self._known: dict[fx.Node, _Dims] = {}
        for node in gm.graph.nodes:
            if node.op != "output" and isinstance(spec := shapes[node], TensorSpec):
                own: _Dims = tuple((node, dim) for dim in range(len(spec.shape)))
                found = self._follow(node, own, spec.shape)
                self._known[node] = found if _fits(found, spec.shape) else own

    def __getitem__(self, node: fx.Node) -> tuple[Size, ...]:
        """The sizes of the tensor at ``node``, one a dimension.

        Raises:
            KeyError: it gives no tensor.
        """
        return self._known[node]

    def asked(self, value: Any) -> Size | None:
        """The size that an argument stands for: a number, or a node such as ``x.size(1)`` or ``x.shape[1]``; ``None``
        if it is -1 or anything else."""
        if type(value) is int:
            return value if value >= 0 else None
        if matching.is_call(value, ("getitem",)):
            sizes, dim = self.asked_whole(value.args[0]), value.args[1]
        elif matching.is_call(value, ("size",)):
            sizes, dim = self._known.get(value.args[0]), matching.argument(value, 1, "dim")
        else:
            return None
        return sizes[dim] if sizes is not None and type(dim) is int and -len(sizes) <= dim < len(sizes) else None

    def asked_whole(self, node: Any) -> tuple[Size, ...] | None:
        """The sizes that ``x.shape`` or ``x.size()`` stands for; ``None`` if ``node`` is neither."""
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        size = matching.is_call(node, ("size",)) and len(node.args) + len(node.kwargs) == 1
        return self._known.get(node.args[0]) if shape or size else None

    def _follow(self, node: fx.Node, own: _Dims, shape: tuple[int, ...]) -> _Dims:
        """The sizes of ``node``; those that are not known, and all in case of doubt, as they are in ``own``."""
        if node.op == "get_attr":
            return shape
        if node.op == "placeholder":
            return _guarded(node, own)
        source = matching.tensor_input(node)
        before = None if source is None else self._known.get(source)
        if before is None:
            return own
        if node.op == "call_module" and len(node.args) + len(node.kwargs) == 1:
            return _of_module(self._gm.get_submodule(str(node.target)), before, own, shape)
        name = matching.name_of_call(node)
        if name in _SHAPE_KEEPING_CALLS:
            return before
        if name in _ELEMENTWISE_CALLS:
            return self._elementwise(node, before, own, shape)
        if name in ("view", "reshape", "expand"):
            return self._reshaped(node, own)
        if name == "flatten":
            start, end = matching.argument(node, 1, "start_dim", 0), matching.argument(node, 2, "end_dim", -1)
            return _flattened(before, own, start, end)
        if name in ("mean", "sum", "amax", "amin"):
            return _reduced(node, before, own)
        if name == "permute" and (order := reshape_arguments(node, "dims")) is not None:
            return tuple(before[d] for d in order if isinstance(d, int))
        return own

    def _elementwise(self, node: fx.Node, before: _Dims, own: _Dims, shape: tuple[int, ...]) -> _Dims:
        """Broadcasting: a size that both have, or the number that one of them has and that is not 1."""
        other = matching.argument(node, 1, "other")
        if isinstance(other, int | float):
            return before
        right = self._known.get(other) if isinstance(other, fx.Node) else None
        if right is None:
            return own
        sizes = list(own)
        for back in range(1, len(own) + 1):
            pair = {part[-back] for part in (before, right) if back <= len(part)}
            numbers = {size for size in pair if isinstance(size, int) and size > 1}
            if len(pair - {1}) <= 1:
                sizes[-back] = next(iter(pair - {1}), 1)
            elif numbers:
                sizes[-back] = shape[-back]
        return tuple(sizes)

    def _reshaped(self, node: fx.Node, own: _Dims) -> _Dims:
        entries = reshape_arguments(node, "size" if matching.name_of_call(node) == "expand" else "shape")
        if entries is None:
            return own
        if len(entries) == 1 and (whole := self.asked_whole(entries[0])) is not None:
            return whole
        asked = [self.asked(entry) for entry in entries]
        return tuple(mine if size is None else size for size, mine in zip(asked, own, strict=False))


def _fits(sizes: _Dims, shape: tuple[int, ...]) -> bool:
    """Whether ``sizes`` can be those of ``shape``: a rule may meet a call that it does not know."""
    ranks = len(sizes) == len(shape)
    return ranks and all(size == actual for size, actual in zip(sizes, shape, strict=True) if isinstance(size, int))


def reshape_arguments(node: fx.Node, keyword: str) -> list[Any] | None:
    """The integers, and nodes that stand for them, of a call such as ``x.view(2, -1)`` or ``x.permute((1, 0))``, given
    one by one or as a sequence; ``None`` if there are others among them, as in ``x.view(torch.int32)``."""
    given: Any = node.args[1:] or node.kwargs.get(keyword, node.kwargs.get("size", ()))
    if isinstance(given, tuple | list) and len(given) == 1 and isinstance(given[0], tuple | list):
        given = given[0]
    values = list(given) if isinstance(given, tuple | list) else [given]
    return values if values and all(isinstance(v, fx.Node) or type(v) is int for v in values) else None


def _guarded(node: fx.Node, own: _Dims) -> _Dims:
    """A recorded graph checks those sizes of its inputs that are not free, in a call of ``check_input``."""
    for user in node.users:
        if getattr(user.target, "__module__", "") == "fxcompress.recording.guards" and user.args[0] is node:
            kind, *rest = user.args[1] if isinstance(user.args[1], Sequence) else ("",)
            if kind == "tensor" and isinstance(rest[0], Sequence):
                return tuple(size if isinstance(size, int) else own[dim] for dim, size in enumerate(rest[0]))
    return own


def _of_module(module: nn.Module, before: _Dims, own: _Dims, shape: tuple[int, ...]) -> _Dims:
    package, _, file = type(module).__module__.rpartition(".")
    if package != "torch.nn.modules":
        return own
    keeps = file in _SHAPE_KEEPING_FILES and not isinstance(module, _NOT_SHAPE_KEEPING)
    if keeps or type(module) is nn.Identity:
        return before
    if type(module) is nn.Linear:
        return (*before[:-1], shape[-1])
    if type(module) is nn.Embedding:
        return (*before, shape[-1])
    if type(module) is nn.Flatten:
        return _flattened(before, own, module.start_dim, module.end_dim)
    # Only with a batch: without one, dimension 0 holds the channels.
    with_batch = type(module).__name__.endswith(f"{len(before) - 2}d")
    if file in ("conv", "pooling") and with_batch and not isinstance(module, _UNPOOLING):
        channels = shape[1] if file == "conv" else before[1]
        return (before[0], channels, *_windowed(module, before, own, shape))
    return own


def _windowed(module: nn.Module, before: _Dims, own: _Dims, shape: tuple[int, ...]) -> _Dims:
    """The sizes in space after convolution or pooling: fixed if those before are, or if asked for by number."""
    given: Any = getattr(module, "output_size", None)  # of adaptive pooling, where None keeps the size
    spatial = len(before) - 2
    numbers = given if isinstance(given, tuple | list) else (given,) * spatial
    fixed = [isinstance(n, int) or isinstance(before[2 + i], int) for i, n in enumerate(numbers)]
    return tuple(shape[2 + i] if fixed[i] else own[2 + i] for i in range(spatial))


def _reduced(node: fx.Node, before: _Dims, own: _Dims) -> _Dims:
    given, keep = matching.argument(node, 1, "dim"), matching.argument(node, 2, "keepdim", False)
    dims = given if isinstance(given, tuple | list) else (given,)
    if not dims or not all(type(dim) is int for dim in dims) or not isinstance(keep, bool):
        return own
    gone = {dim % len(before) for dim in dims if before}
    if keep:
        return tuple(1 if dim in gone else size for dim, size in enumerate(before))
    return tuple(size for dim, size in enumerate(before) if dim not in gone)


def _flattened(before: _Dims, own: _Dims, start: Any, end: Any) -> _Dims:
    if not before or not isinstance(start, int) or not isinstance(end, int):
        return own
    start, end = start % len(before), end % len(before)
    merged: Size = before[start] if start == end else own[start]
    product = 1
    for size in before[start : end + 1]:
        if not isinstance(size, int):
            return (*before[:start], merged, *before[end + 1 :])
        product *= size
    return (*before[:start], product, *before[end + 1 :])
