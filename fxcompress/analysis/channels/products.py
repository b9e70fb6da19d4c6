"""Rules for contractions: convolutions, linear layers, matrix products, attention, embeddings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fxcompress.analysis.channels.atoms import FIXED
from fxcompress.analysis.channels.call import Call, Rule
from fxcompress.analysis.channels.maps import Grouping, Labelled, Product

__all__ = ["RULES"]


def _linear(call: Call) -> Any:
    """y[..., o] = sum_i x[..., i] W[o, i] + b[o]."""
    x, weight, bias = call.first(), call.get(1, "weight"), call.get(2, "bias")
    rank = len(x.shape)
    letters = [f"x{d}" for d in range(rank - 1)]
    out = call.labels.einsum([x, weight], [[*letters, "i"], ["o", "i"]], [*letters, "o"])
    call.labels.produce(call.labels.vector(weight, 0))
    return _with_bias(call, out, weight, bias, rank - 1)


def _with_bias(call: Call, out: Labelled, weight: Labelled, bias: Any, dim: int) -> Any:
    """``out`` plus the bias along ``dim``; what goes there is zero by the weight, what goes elsewhere by the input."""
    other = any(dim not in m.dims and not call.labels.atoms.are_frozen(m.ids.ravel()) for m in out.maps)
    zero = weight.zero and (call.first().zero or not other)
    if isinstance(bias, Labelled):
        shape = [-1 if d == dim else 1 for d in range(len(out.shape))]
        out = call.labels.elementwise([out, call.labels.move([bias], lambda t: t.reshape(shape))])
        zero = zero and bias.zero and not other
    return call.same(out, zero)


def _convolution(call: Call) -> Any:
    return _convolve(call, transposed=False, groups=int(call.get(6, "groups", default=1)))


def _transposed_convolution(call: Call) -> Any:
    return _convolve(call, transposed=True, groups=int(call.get(6, "groups", default=1)))


def _convolve(call: Call, transposed: bool, groups: int) -> Any:
    """weight is (out, in / groups, *kernel), transposed (in, out / groups, *kernel). With groups, either whole groups
    go or the same part of every group."""
    labels, atoms = call.labels, call.labels.atoms
    x, weight, bias = call.first(), call.get(1, "weight"), call.get(2, "bias")
    rank, dim = len(x.shape), len(x.shape) - len(weight.shape) + 1  # no batch: the channels come first
    entering = labels.vector(x, dim)
    first, second = labels.vector(weight, 0), labels.vector(weight, 1)
    out, why = first, x.why or weight.why
    if transposed:
        atoms.unite(entering, first, why)
        out = second if groups == 1 else atoms.new(groups * weight.shape[1])
    elif groups == 1:
        atoms.unite(entering, second, why)
    if groups > 1:
        within = (None, second) if transposed else (second, None)
        labels.group(Grouping(entering.reshape(groups, -1), out.reshape(groups, -1), why, labels.place, *within))
    # A kernel of size 1 that steps by 1 takes each place in space by itself.
    alone = not transposed and set(weight.shape[2:]) == {1} and tuple(call.out.shape[dim + 1 :]) == x.shape[dim + 1 :]
    for axis in range(dim + 1, rank):
        if (m := x.about(axis)) is not None and not (alone and m.dims == {axis}):
            atoms.freeze(m.ids.ravel(), f"a place in space for {labels.place}")
    if not (x.zero or weight.zero):
        atoms.mark_inexact(entering.ravel())
    labels.produce(out)
    result_shape = call.out.shape
    counted = x.shape if transposed else result_shape
    labels.products.append(Product(math.prod(counted) * math.prod(weight.shape[1:]), (first, second)))
    maps = tuple(m for m in x.maps if max(m.dims) < dim or (alone and len(m.dims) == 1 and min(m.dims) > dim))
    if (out != FIXED).any():  # one channel, or a weight that is no parameter: nothing can go
        maps = (*maps, labels.along(out, dim, rank))
    found = Labelled(tuple(result_shape), maps, why)
    return _with_bias(call, found, weight, bias, dim)


def _matmul(call: Call) -> Any:
    left, right = call.first(), call.get(1, "other", "mat2", "tensor2", "vec")
    if call.name in ("rmatmul",):
        left, right = right, left
    return call.same(_product(call, left, right))


def _product(call: Call, left: Labelled, right: Labelled) -> Labelled:
    a, b = _batch_letters(len(left.shape) - 2), _batch_letters(len(right.shape) - 2)
    rows = ["n"] if len(left.shape) > 1 else []
    columns = ["m"] if len(right.shape) > 1 else []
    batch = a if len(a) > len(b) else b
    return call.labels.einsum([left, right], [[*a, *rows, "k"], [*b, "k", *columns]], [*batch, *rows, *columns])


def _batch_letters(count: int) -> list[str]:
    return [f"b{count - i}" for i in range(count)]  # counted from the right, as they broadcast


def _added_product(call: Call) -> Any:
    """addmm, baddbmm: input + a @ b."""
    added = call.first()
    found = _product(call, call.get(1, "mat1", "batch1"), call.get(2, "mat2", "batch2"))
    out = call.labels.elementwise([added, found])
    return call.same(out, all(call.labels.zero_wherever(x, out) for x in (added, found)))


def _einsum(call: Call) -> Any:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = []
    for term, x in zip(inputs.split(","), operands, strict=True):
        before, _, after = term.partition("...")
        letters.append([*before, *_batch_letters(len(x.shape) - len(before) - len(after)), *after])
    hidden = max(([k for k in names if len(k) > 1] for names in letters), key=len)
    if arrow:
        before, dots, after = output.partition("...")
        out = [*before, *(hidden if dots else []), *after]
    else:
        plain = inputs.replace(",", "").replace("...", "")
        out = [*hidden, *sorted(k for k in set(plain) if plain.count(k) == 1)]
    if any(len(set(names)) < len(names) for names in letters):  # a diagonal
        for x in operands:
            call.labels.freeze(x, f"a diagonal is taken by {call.labels.place}")
        return call.unlabelled(f"a diagonal taken by {call.labels.place}")
    return call.same(call.labels.einsum(operands, letters, out))


def _attention(call: Call) -> Any:
    """softmax(q k^T) v, with q (..., H, L, E), k (..., H or fewer, S, E), v (..., H or fewer, S, Ev)."""
    query, key, value = call.first(), call.get(1, "key"), call.get(2, "value")
    mask = call.get(3, "attn_mask")
    if call.get(7, "enable_gqa", default=False):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (call.labels.move([x], lambda t: t.repeat_interleave(repeats, -3)) for x in (key, value))
    q, k, v = (_batch_letters(len(x.shape) - 2) for x in (query, key, value))
    longest = max(q, k, v, key=len)
    # Settled together: what the values are labelled with decides about queries and keys too.
    logits = call.labels.einsum([query, key], [[*q, "l", "e"], [*k, "s", "e"]], [*longest, "l", "s"])
    logits = dataclasses.replace(logits, zero=False)
    if isinstance(mask, Labelled):
        logits = call.labels.elementwise([logits, mask])
    call.labels.inexact_along(logits, [len(logits.shape) - 1])
    return call.same(call.labels.einsum([logits, value], [[*longest, "l", "s"], [*v, "s", "d"]], [*longest, "l", "d"]))


def _embedding(call: Call) -> Any:
    weight = call.get(1, "weight")
    if not weight.maps:
        return call.unlabelled(weight.why)
    atoms = call.labels.vector(weight, 1)
    rank = len(call.out.shape)
    call.labels.produce(atoms)
    call.labels.freeze_late(call.labels.vector(weight, 0), f"looked up by {call.labels.place}")
    return Labelled(tuple(call.out.shape), (call.labels.along(atoms, rank - 1, rank),), "", True)


RULES: Mapping[str, Rule] = {
    "linear": _linear,
    "grouped_linear": _convolution,  # without a kernel
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "rmatmul"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
}
