"""Rules for what only moves elements: the very operation runs on numbered positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fxcompress.analysis.channels.call import Call, Rule
from fxcompress.analysis.channels.maps import Labelled

__all__ = ["RULES"]


def _moved(call: Call) -> Any:
    """Any function of one tensor whose other arguments do not depend on what is labelled."""
    x = call.first()
    if call.args and isinstance(call.args[0], Labelled):
        rest = call.real_args[1:]
        return call.labels.move([x], lambda t: call.run(t, *rest, **call.real_kwargs))
    name = next(k for k in ("input", "self", "tensor") if k in call.kwargs)
    return call.labels.move([x], lambda t: call.run(**{**call.real_kwargs, name: t}))


def _along(position: int, default: Any = None) -> Rule:
    """As :func:`_moved`, with what is labelled along the dimensions that the call names frozen: a shift, a window or an
    index there would mean something else afterwards."""

    def rule(call: Call) -> Any:
        return _moved_with_fixed(call, set(call.dims(call.get(position, "dim", "dims", "axis", default=default))))

    return rule


def _moved_with_fixed(call: Call, fixed: set[int]) -> Any:
    x, *indices = call.tensors()
    for index in indices:
        call.labels.freeze(index, f"an index for {call.labels.place}")
    x = call.labels.freeze_along(x, fixed, f"reordered by {call.labels.place}")
    return _moved(dataclasses.replace(call, args=(x, *call.args[1:])))


def _getitem(call: Call) -> Any:
    if not isinstance(call.args[0], Labelled):
        return call.args[0][call.real_args[1]]
    x = call.args[0]
    index = call.real_args[1] if isinstance(call.real_args[1], tuple) else (call.real_args[1],)
    taken = sum(_dims_of_index(i) for i in index)
    dim, fixed = 0, set()
    for i in index:
        if i is Ellipsis:
            dim += len(x.shape) - taken
            continue
        if isinstance(i, int) and not isinstance(i, bool) and (m := x.about(dim)) is not None and len(m.dims) > 1:
            x = call.labels.tie_along(x, dim)
        count = _dims_of_index(i)
        if isinstance(i, torch.Tensor) and i.dim() > 1 and count > 1:
            fixed |= set(range(len(x.shape)))
        moves = isinstance(i, (torch.Tensor, list)) or (isinstance(i, slice) and i.step not in (None, 1))
        if moves or isinstance(i, bool):
            fixed |= set(range(dim, dim + count))
        dim += count
    return _moved_with_fixed(dataclasses.replace(call, args=(x, *call.args[1:])), fixed)


def _dims_of_index(i: Any) -> int:
    """How many dimensions of the tensor an item of an index is about."""
    if i is None or i is Ellipsis or isinstance(i, bool):
        return 0
    return i.dim() if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) else 1


def _select(call: Call) -> Any:
    x, dim = call.first(), call.dim(call.get(1, "dim"))
    m = x.about(dim)
    if m is not None and len(m.dims) > 1:
        x = call.labels.tie_along(x, dim)
    return _moved(dataclasses.replace(call, args=(x, *call.args[1:])))


def _unbind(call: Call) -> Any:
    x = call.labels.tie_along(call.first(), call.dim(call.get(1, "dim", default=0)))
    return _moved(dataclasses.replace(call, args=(x, *call.args[1:])))


def _split(call: Call) -> Any:
    dim = call.dim(call.get(2, "dim", default=0))
    x = call.first()
    parts = [t.shape[dim] for t in call.out]
    m = x.about(dim)
    if m is not None and len(m.dims) > 1 and all(size == 1 for size in parts):
        x = call.labels.tie_along(x, dim)
    return _moved(dataclasses.replace(call, args=(x, *call.args[1:])))


def _sequence(call: Call) -> list[Labelled]:
    given = call.get(0, "tensors", "input")
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _cat(call: Call) -> Any:
    inputs = [x for x in _sequence(call) if x.shape != (0,)]  # torch.cat takes empty 1-d tensors along with any
    dim = call.get(1, "dim", "axis", default=0)
    return call.labels.move(inputs, lambda *ts: torch.cat(ts, dim))


def _stack(call: Call) -> Any:
    inputs, dim = _sequence(call), call.get(1, "dim", "axis", default=0)
    inputs = [call.labels.move([x], lambda t: t.unsqueeze(dim)) for x in inputs]
    return call.labels.move(inputs, lambda *ts: torch.cat(ts, dim))


def _joined(call: Call) -> Any:
    return call.labels.move(_sequence(call), lambda *ts: call.run(ts))


def _pad(call: Call) -> Any:
    x, pads = call.first(), list(call.get(1, "pad"))
    rank = len(x.shape)
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    for dim in padded:
        x = call.labels.tie_along(x, dim)
    return call.same(x, x.zero and not call.get(3, "value"))


def _expand(call: Call) -> Any:
    """What is repeated along a dimension of size 1 can be repeated less often: it has atoms of its own there."""
    x, labels = call.first(), call.labels
    out = _moved(call)
    extra = len(out.shape) - len(x.shape)
    fresh = tuple(
        labels.along(labels.atoms.new(size), d, len(out.shape))
        for d, size in enumerate(out.shape)
        if size > 1 and (d < extra or x.shape[d - extra] == 1)
    )
    return dataclasses.replace(out, maps=(*out.maps, *fresh), zero=out.zero and not fresh)


def _unfold(call: Call) -> Any:
    """``Tensor.unfold`` gives windows along one dimension; ``F.unfold`` takes patches."""
    if len(call.out.shape) == len(call.first().shape) + 1:
        return _along(1)(call)
    call.labels.freeze(call.first(), f"cut into patches by {call.labels.place}")
    return call.unlabelled(f"cut into patches by {call.labels.place}")


def _gather(call: Call) -> Any:
    """out[i, j] = x[i, index[i, j]]: along the other dimensions x and index go together."""
    x, index, labels = call.first(), call.get(2, "index", "indices"), call.labels
    dim = call.dim(call.get(1, "dim"))
    if not isinstance(index, Labelled):
        return _picked(call)
    parts = []
    for t in (x, index):
        bad = {d for d in range(len(t.shape)) if d == dim or x.shape[d] != index.shape[d]}
        left = labels.freeze_along(t, bad, f"picked by {labels.place}")
        parts.append(dataclasses.replace(left, shape=tuple(1 if d in bad else s for d, s in enumerate(t.shape))))
    return call.same(labels.elementwise(parts, x.zero))


def _picked(call: Call) -> Any:
    for x in call.tensors():
        call.labels.freeze(x, f"picked by {call.labels.place}")
    return call.unlabelled(f"picked by {call.labels.place}")


def _like_other(call: Call) -> Any:
    """``x.view_as(y)``: only the shape of y counts."""
    shape = call.out.shape
    return call.labels.move([call.first()], lambda t: t.expand(shape) if "expand" in call.name else t.reshape(shape))


def _repeat_interleave(call: Call) -> Any:
    dim = call.get(2, "dim")
    if isinstance(call.get(1, "repeats"), Labelled) or dim is None:
        return _moved_with_fixed(call, set(range(len(call.first().shape))))
    return _moved(call)


def _pixel_shuffle(call: Call) -> Any:
    """(C r r, H, W) -> (C, H r, W r): the r r channels that become one go together."""
    x = _moved(call)
    return dataclasses.replace(x, maps=tuple(call.labels.keep_one(m, len(x.shape) - 3) for m in x.maps))


def _channel_shuffle(call: Call) -> Any:
    """(g c) -> (c g): as many groups stay, so that the same part of each goes."""
    x, groups = call.first(), int(call.get(1, "groups"))
    apart = call.labels.move([x], lambda t: t.unflatten(1, (groups, -1)))
    return call.labels.move([call.labels.tie_along(apart, 1)], lambda t: t.transpose(1, 2).flatten(1, 2))


_SIMPLE = """
    view reshape flatten unflatten permute transpose t T mT H mH adjoint movedim moveaxis swapaxes swapdims squeeze
    unsqueeze repeat tile narrow flip fliplr flipud atleast_1d atleast_2d atleast_3d
    ravel pixel_unshuffle
"""

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SIMPLE.split(), _moved),
    "getitem": _getitem,
    "select": _select,
    "unbind": _unbind,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"), _split),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("hstack", "vstack", "dstack", "column_stack"), _joined),
    "pad": _pad,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    **dict.fromkeys(("take", "diagonal", "as_strided", "diag", "masked_select"), _picked),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), _like_other),
    "index_select": _along(1),
    "roll": _along(2),
    "rot90": _along(2, (0, 1)),
    "unfold": _unfold,
    "repeat_interleave": _repeat_interleave,
    "pixel_shuffle": _pixel_shuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
}
"""Name of a function -> its rule. ``Tensor.unfold`` is a window along one dimension; ``F.unfold`` is elsewhere."""
