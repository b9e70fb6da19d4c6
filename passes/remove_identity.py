"""Remove what returns its input: identities, dropout that does not drop, and operations whose arguments undo them.

Three kinds, by what the result shares with the input (guarantee EXACT for each):

* the input itself or a view of all of it (``nn.Identity``, dropout, ``view`` to the same shape): always removable;
* a copy (``x + 0``, ``clone``, pooling with a kernel of 1): removable only if nothing changes the copy or the
  original in place afterwards, the graph does not hand out both, and no ``view`` counts on the copy's strides;
* the input *on the example*, which another batch size or dtype would undo: refused. A reshape is removed when it is
  none whatever the sizes: each size it names is provably that of the input, except at most one, which then follows
  from the number of elements (tensors without elements aside). A cast is removed when the input has that dtype by
  construction, not when it merely follows the dtype of the parameters, which ``gm.half()`` may change later.

Dropout in evaluation mode does nothing, so it goes, and a later ``gm.train()`` does not bring it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.analysis.sizes import Sizes, reshape_arguments
from fxcompress.modules import StochasticDepth
from fxcompress.pass_base import Guarantee, Pass, PassContext, Refusal, Site, Stage

__all__ = ["RemoveIdentity"]

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, StochasticDepth,
)  # fmt: skip
_DROPOUT_CALLS = {  # whether the function is in training mode if the call does not say
    "dropout": True, "dropout1d": True, "dropout2d": True, "dropout3d": True,
    "alpha_dropout": False, "feature_alpha_dropout": False,
}  # fmt: skip
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_UPSAMPLES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
_CASTS = {
    "half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64,
    "bool": torch.bool, "char": torch.int8, "byte": torch.uint8, "short": torch.int16, "int": torch.int32,
    "long": torch.int64,
}  # fmt: skip
_COMPARISONS = frozenset("eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or".split())
_REARRANGING = frozenset(
    "view reshape flatten permute transpose expand unsqueeze squeeze contiguous clone detach".split()
)
# These change the shape or strides of a tensor object in place, so a view is not the same as what it views.
_RESTRIDING = frozenset(
    "resize_ resize_as_ squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ set_".split()
)


@dataclasses.dataclass(frozen=True)
class _Same:
    """A call that returns its first argument."""

    what: str
    kind: str = "itself"
    """``"itself"``, ``"view"``, ``"copy"`` (with the strides of a dense input) or ``"compact copy"`` (contiguous)."""


class _Look:
    """The graph, and what is worked out about it at most once."""

    def __init__(self, context: PassContext) -> None:
        self.context = context

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.context.gm, self.context.shapes)

    @cached_property
    def memory(self) -> Memory:
        return Memory(self.context.gm, lambda node: _spec(self, node) is not None)


@dataclasses.dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove calls that return their input unchanged. Without example inputs only those that need no shape are found.

    Detail of a site: ``{"what": words}``.
    """

    name: ClassVar[str] = "remove-identity"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    repeat: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.CLEAN

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """In graph order; see the module docstring for what is refused."""
        look = _Look(context)
        restrided = any(matching.is_call(node, _RESTRIDING) for node in context.gm.graph.nodes)
        for node in context.gm.graph.nodes:
            found = _examine(look, node)
            source = matching.tensor_input(node)
            if found is None or source is None:
                continue
            if isinstance(found, _Same) and found.kind == "view" and restrided:
                found = f"{found.what}, but some node of this graph changes the strides of a tensor in place"
            elif isinstance(found, _Same) and found.kind in ("copy", "compact copy"):
                reason = look.memory.obstacle_to_sharing(node, source, keeps_strides=found.kind == "copy")
                found = f"{found.what}, which makes a copy, and {reason}" if reason else found
            if isinstance(found, str):
                yield Refusal(node, found)
            else:
                yield Site(node, detail={"what": found.what})

    def rewrite(self, site: Site) -> None:
        """Let the readers of the site's node read its input."""
        source = matching.tensor_input(site.node)
        assert source is not None, "sites() admits only calls whose first argument is a node"
        editing.replace(site.node, source)


def _examine(look: _Look, node: fx.Node) -> _Same | str | None:
    """What makes ``node`` an identity, why it is only nearly one, or ``None``: it is nothing of the kind."""
    module = look.context.module(node)
    if module is not None:
        found = _examine_module(look, node, module)
        overridden = matching.override_of(module) if found is not None else None
        return f"{type(module).__name__} that {overridden}" if overridden else found
    name = matching.name_of_call(node)
    examine = _CALLS.get(name)
    return examine(look, node, name) if examine else None


def _examine_module(look: _Look, node: fx.Node, module: Any) -> _Same | str | None:
    kind: type[nn.Module] = type(module)
    what = kind.__name__
    if kind is nn.Identity or (kind is nn.Sequential and not module._modules):
        return _Same(what)
    if isinstance(module, _DROPOUTS) and kind in _DROPOUTS:
        return _dropout(what, module.p, module.training)
    if kind is nn.Flatten:
        return _flatten(look, node, module.start_dim, module.end_dim)
    if kind in _POOLS:
        return _Same(f"{what} with a kernel of 1", "compact copy") if _is_trivial_pool(module) else None
    if kind in _UPSAMPLES:
        trivial = module.size is None and _all(module.scale_factor, 1)
        return _Same(f"{what} by a factor of 1", "compact copy") if trivial else None
    if kind.__module__ == "torch.nn.modules.padding" and _all(module.padding, 0):
        return _Same(f"{what} by nothing", "compact copy")
    return None


def _is_trivial_pool(pool: Any) -> bool:
    plain = _all(pool.kernel_size, 1) and _all(pool.stride, 1) and _all(pool.padding, 0)
    return plain and getattr(pool, "divisor_override", None) in (None, 1) and not getattr(pool, "return_indices", False)


def _all(value: Any, wanted: int) -> bool:
    """Whether a number, or each of a sequence of numbers, is ``wanted``."""
    values = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(v, int | float) and v == wanted for v in values)


def _dropout(what: str, p: Any, training: Any) -> _Same | str | None:
    if training is False or p == 0:
        return _Same(f"{what} that never drops")
    return f"{what} in training mode; call model.eval() first" if training is True else None


def _dropout_call(look: _Look, node: fx.Node, name: str) -> _Same | str | None:
    default = _DROPOUT_CALLS[name]
    training = node.kwargs.get("train", matching.argument(node, 2, "training", default))
    return _dropout(name, matching.argument(node, 1, "p", 0.5), training)


# --- shapes ---


def _spec(look: _Look, node: Any) -> TensorSpec | None:
    """What is known of ``node`` if it gives a tensor and there is an example to tell."""
    if look.context.example is None or not isinstance(node, fx.Node):
        return None
    value = look.context.shapes[node]
    return value if isinstance(value, TensorSpec) else None


def _same_shape(look: _Look, node: fx.Node) -> tuple[int, ...] | None:
    """The shape of ``node`` if its input has the same one on the example."""
    spec, source = _spec(look, node), _spec(look, matching.tensor_input(node))
    return spec.shape if spec and source and spec.shape == source.shape else None


def _flatten_call(look: _Look, node: fx.Node, name: str) -> _Same | None:
    start, end = matching.argument(node, 1, "start_dim", 0), matching.argument(node, 2, "end_dim", -1)
    return _flatten(look, node, start, end)


def _flatten(look: _Look, node: fx.Node, start: Any, end: Any) -> _Same | None:
    # One rank less for every dimension that is flattened into another, so an equal rank is proof for all sizes.
    shape = _same_shape(look, node)
    if not shape or not isinstance(start, int) or not isinstance(end, int):
        return None
    return _Same("flatten of one dimension", "view") if start % len(shape) == end % len(shape) else None


def _reshape(look: _Look, node: fx.Node, name: str) -> _Same | str | None:
    shape = _same_shape(look, node)
    entries = reshape_arguments(node, "size" if name == "expand" else "shape")
    source = matching.tensor_input(node)
    if shape is None or entries is None or source is None:
        return None
    sizes = look.sizes
    if len(entries) == 1 and sizes.asked_whole(entries[0]) == sizes[source]:
        return _Same(f"{name} to its own shape", "view")
    if len(entries) == len(shape):
        open_ = sum(
            sizes.asked(entry) != size and not (name == "expand" and entry == -1)
            for entry, size in zip(entries, sizes[source], strict=True)
        )
        # The number of elements settles one of them; not in an expand, which may change that number.
        if open_ <= (0 if name == "expand" else 1):
            return _Same(f"{name} to the same shape", "view")
    return f"{name} that keeps the shape {list(shape)} of the example, but cannot be shown to keep every other"


def _permute(look: _Look, node: fx.Node, name: str) -> _Same | None:
    if name == "permute":
        dims = reshape_arguments(node, "dims")
        spec = _spec(look, node)
        if not dims or not all(isinstance(d, int) for d in dims):
            return None
        kept = [d % len(dims) for d in dims] == list(range(len(dims))) and (
            spec is None or len(dims) == len(spec.shape)
        )
        return _Same("permute that moves nothing", "view") if kept else None
    a = matching.argument(node, 1, "dim0", node.kwargs.get("axis0"))
    b = matching.argument(node, 2, "dim1", node.kwargs.get("axis1"))
    return _Same(f"{name} that moves nothing", "view") if isinstance(a, int) and a == b else None


def _slice(look: _Look, node: fx.Node, name: str) -> _Same | None:
    index = matching.argument(node, 1, "index")
    parts = index if isinstance(index, tuple) else (index,)
    if _spec(look, node.args[0]) is None or not parts:
        return None
    whole = all(part is Ellipsis or part == slice(None, None, None) for part in parts)
    return _Same("index that takes everything", "view") if whole else None


def _contiguous(look: _Look, node: fx.Node, name: str) -> _Same | None:
    # Only after another one: elsewhere the strides depend on the input's and on the memory format of the parameters.
    source = matching.tensor_input(node)
    if source is None or not matching.is_call(source, ("contiguous",)):
        return None
    same = node.args[1:] == source.args[1:] and node.kwargs == source.kwargs
    return _Same("contiguous of what is contiguous", "itself") if same else None


# --- dtypes ---


def _cast(look: _Look, node: fx.Node, name: str) -> _Same | str | None:
    source = matching.tensor_input(node)
    asked = _asked_dtype(node)
    if source is None or asked is None:
        return None
    if asked is source or (isinstance(asked, torch.dtype) and _pinned_dtype(source) == asked):
        return _Same(f"{name} to the dtype it has")
    spec = _spec(look, source)
    if spec is None or spec.dtype != asked:
        return None
    return f"{name} to {asked}, which the input has on the example but not by construction (think of gm.half())"


def _asked_dtype(node: fx.Node) -> torch.dtype | fx.Node | None:
    """The dtype a cast asks for, or the tensor whose dtype it asks for; ``None`` if it asks for more or for else."""
    name = matching.name_of_call(node)
    if name in _CASTS:
        return _CASTS[name] if len(node.args) == 1 and not node.kwargs else None
    given = [*node.args[1:], *node.kwargs.values()]
    if len(given) != 1 or not set(node.kwargs) <= {"dtype", "other"}:
        return None
    asked = given[0]
    if isinstance(asked, torch.dtype):
        return asked
    if not isinstance(asked, fx.Node):
        return None
    if asked.op == "call_function" and asked.target is getattr and asked.args[1] == "dtype":
        return matching.tensor_input(asked)
    return asked if name == "type_as" else None


def _pinned_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that ``node`` has whatever the dtypes of inputs and parameters."""
    source = matching.tensor_input(node)
    while source is not None and matching.is_call(node, _REARRANGING) and not _mentions_dtype(node):
        node, source = source, matching.tensor_input(source)
    if matching.is_call(node, _COMPARISONS):
        return torch.bool
    if matching.is_call(node, ("argmax", "argmin")):
        return torch.int64
    asked = _asked_dtype(node) if matching.is_call(node, (*_CASTS, "to", "type")) else None
    return asked if isinstance(asked, torch.dtype) else None


def _mentions_dtype(node: fx.Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


# --- arithmetic and the rest ---


def _neutral(look: _Look, node: fx.Node, name: str) -> _Same | None:
    """``x + 0``, ``x - 0``, ``x * 1``, ``x / 1``."""
    if len(node.args) != 2 or node.kwargs:
        return None
    x, c = node.args
    if not isinstance(x, fx.Node) or type(c) not in (int, float) or c != (0 if name in ("add", "sub") else 1):
        return None
    spec, source = _spec(look, node), _spec(look, x)
    # The same dtype on the example is proof: a number never lowers a dtype, and raises it by kind, not by width.
    return _Same(f"{name} of {c}", "copy") if spec and source and spec.dtype == source.dtype else None


def _pad(look: _Look, node: fx.Node, name: str) -> _Same | None:
    padding = matching.argument(node, 1, "pad")
    return _Same("pad by nothing", "compact copy") if isinstance(padding, tuple | list) and _all(padding, 0) else None


def _clone(look: _Look, node: fx.Node, name: str) -> _Same | None:
    return _Same("clone", "copy") if len(node.args) == 1 and not node.kwargs else None


_Examiner = Callable[[_Look, fx.Node, str], _Same | str | None]
_CALLS: dict[str, _Examiner] = {
    **dict.fromkeys(_DROPOUT_CALLS, _dropout_call),
    **dict.fromkeys((*_CASTS, "to", "type", "type_as"), _cast),
    **dict.fromkeys(("view", "reshape", "expand"), _reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims"), _permute),
    **dict.fromkeys(("add", "sub", "mul", "div", "truediv", "true_divide"), _neutral),
    "flatten": _flatten_call,
    "getitem": _slice,
    "contiguous": _contiguous,
    "pad": _pad,
    "clone": _clone,
}
