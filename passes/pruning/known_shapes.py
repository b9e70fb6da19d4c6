"""Rules for what is sure of a result: what only moves elements, and what acts on places in space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.passes.pruning.known import Known, KnownCall

__all__ = ["MOVES", "SPACE", "joined"]

Rule = Callable[[KnownCall], Any]

_FREE = frozenset("view reshape unflatten flatten expand broadcast_to repeat tile".split())
"""What may be given sizes that follow from those of inputs: it takes every element, at any size."""


def moved(call: KnownCall) -> Any:
    """The very operation runs on what is sure of each element, and on the values."""
    x = call.first()
    alone = len(call.tensors()) == 1 and bool(call.args) and isinstance(call.args[0], Known)
    if not x.any or not alone or (call.sized and call.name not in _FREE):
        return call.nothing()
    rest, kwargs = call.args[1:], call.kwargs
    try:
        found = [call.run(t, *rest, **kwargs) for t in x.expanded()]
    except Exception:  # it may want what is kept of a tensor here not to be: then nothing is known of it
        return call.nothing()
    return _together(call, found)


def _together(call: KnownCall, found: Sequence[Any]) -> Any:
    """A :class:`Known` for each tensor, of ``sure`` and values that have gone the same way."""
    (sures, spec), (values, _) = (pytree.tree_flatten(f) for f in found)
    outs = pytree.tree_leaves(call.out)
    if len(outs) != len(sures) or any(o.shape != s.shape for o, s in zip(outs, sures, strict=True)):
        return call.nothing()
    return pytree.tree_unflatten([Known.shrunk(s.shape, s, v) for s, v in zip(sures, values, strict=True)], spec)


def _expand(call: KnownCall) -> Any:
    x = call.first()
    return Known.where(call.out.shape, *x.aligned(len(call.out.shape)))


def _like_other(call: KnownCall) -> Any:
    x, shape = call.first(), call.out.shape
    return Known.shrunk(shape, *(t.reshape(shape) for t in x.expanded())) if x.any else call.nothing()


def _sequence(call: KnownCall) -> list[Known]:
    given = call.get(0, "tensors", "input")
    return list(given) if isinstance(given, (tuple, list)) else [given]


def joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
    """Each of (``sure``, values) joined along ``dim``, along which the parts have these sizes."""
    found = []
    for tensors in zip(*parts, strict=True):
        small = list(np.broadcast_shapes(*(t.select(dim, 0).shape for t in tensors)))
        found.append(
            torch.cat([t.expand([*small[:dim], n, *small[dim:]]) for t, n in zip(tensors, sizes, strict=True)], dim)
        )
    return found


def _cat(call: KnownCall) -> Any:
    parts = [x for x in _sequence(call) if x.shape != (0,)]
    dim = int(call.get(1, "dim", "axis", default=0)) % len(call.out.shape)
    if not any(x.any for x in parts):
        return call.nothing()
    both = joined([(x.sure, x.wide) for x in parts], [x.shape[dim] for x in parts], dim)
    return Known.where(call.out.shape, *both)


def _stack(call: KnownCall) -> Any:
    parts, dim = _sequence(call), int(call.get(1, "dim", "axis", default=0)) % len(call.out.shape)
    if not any(x.any for x in parts):
        return call.nothing()
    pairs = [(x.sure.unsqueeze(dim), x.wide.unsqueeze(dim)) for x in parts]
    return Known.shrunk(call.out.shape, *joined(pairs, [1] * len(parts), dim))


def _shuffled(call: KnownCall) -> Any:
    """Channel shuffles, on booleans too, for which PyTorch has none."""
    x, groups = call.first(), int(call.get(1, "groups", default=1))
    if not x.any:
        return call.nothing()
    mixed = [t.reshape(len(t), groups, -1, *t.shape[2:]).transpose(1, 2).flatten(1, 2) for t in x.expanded()]
    return Known.shrunk(call.out.shape, *mixed)


# ------------------------------------------------------------------------------------------------- space
def _even_along(x: Known, dims: Sequence[int]) -> bool:
    return all(x.sure.shape[d] == 1 for d in dims)


def _pad(call: KnownCall) -> Any:
    """What pads must be what is there already."""
    x, pads = call.first(), list(call.get(1, "pad"))
    mode, fill = call.get(2, "mode", default="constant"), call.get(3, "value", default=0) or 0
    dims = [len(x.shape) - 1 - i // 2 for i, amount in enumerate(pads) if amount]
    return _padded(call, x, dims, fill if mode == "constant" else None)


def _padded(call: KnownCall, x: Known, dims: Sequence[int], fill: float | None) -> Any:
    if not x.any or not _even_along(x, dims):
        return call.nothing()
    fits = torch.ones((), dtype=torch.bool) if fill is None or not dims else x.wide == fill
    return Known.where(call.out.shape, x.sure & fits, x.wide)


_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_OWN_PADS = (nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd)


def _average(call: KnownCall) -> Any:
    """Averages, which may count zeros beyond the border; pads by modules go by the same name."""
    x, module = call.first(), call.module
    space = list(range(len(x.shape) - int(call.name[-2]), len(x.shape)))
    if isinstance(module, _CONSTANT_PADS):
        return _padded(call, x, space, float(module.value))
    if isinstance(module, _OWN_PADS):
        return _padded(call, x, space, None)
    if module is None:
        plain = len(call.args) <= 3 and set(call.kwargs) <= {"input", "kernel_size", "stride"}
    else:
        plain = not any(_numbers(module.padding)) and getattr(module, "divisor_override", None) is None
        plain = plain and not module.ceil_mode
    return _pooled(call, plain)


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _pooled(call: KnownCall, plain: bool = True) -> Any:
    """What is the same everywhere stays so; if not ``plain``, only where it is zero."""
    x = call.first()
    space = int(call.name[-2]) if call.name[-1] == "d" else len(x.shape) - 2
    if not isinstance(call.out, torch.Tensor) or not x.any:
        return call.nothing()
    if not _even_along(x, range(len(x.shape) - space, len(x.shape))):
        return call.nothing()
    return Known.where(call.out.shape, x.sure if plain else x.zero, x.wide)


def _only_zero(call: KnownCall) -> Any:
    return _pooled(call, plain=False)


_MOVED = """
    view reshape flatten unflatten permute transpose t T mT H mH adjoint movedim moveaxis swapaxes swapdims squeeze
    unsqueeze repeat tile narrow flip fliplr flipud atleast_1d atleast_2d atleast_3d ravel pixel_unshuffle pixel_shuffle
    getitem select unbind split chunk split_with_sizes tensor_split unsafe_chunk unsafe_split roll repeat_interleave
"""

MOVES: Mapping[str, Rule] = {
    **dict.fromkeys(_MOVED.split(), moved),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    **dict.fromkeys(("view_as", "reshape_as"), _like_other),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _shuffled),
    "pad": _pad,
}

SPACE: Mapping[str, Rule] = {
    **{f"max_pool{d}d": _pooled for d in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{d}d": _pooled for kind in ("avg", "max") for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _average for d in (1, 2, 3)},
    **{f"lp_pool{d}d": _only_zero for d in (1, 2)},
    **dict.fromkeys(("upsample", "upsample_bilinear", "upsample_nearest"), _pooled),
    "interpolate": _pooled,
}
