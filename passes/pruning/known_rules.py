"""Rules for what is sure of a result, given what is sure of the arguments. Without a rule nothing is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels.arithmetic import is_pointwise
from fxcompress.passes.pruning.known import Known, KnownCall
from fxcompress.passes.pruning.known_shapes import MOVES, SPACE
from fxcompress.passes.pruning.mixing import MIXES, Mix

__all__ = ["rule_for"]

Rule = Callable[[KnownCall], Any]

_RANDOM = frozenset("bernoulli rand_like randn_like rrelu native_dropout empty_like".split())
_PLACED = frozenset(("tril", "triu"))
"""Element by element, but each by its place."""


def rule_for(name: str) -> Rule | None:
    """The rule of the function of this name."""
    if name in RULES:
        return RULES[name]
    return pointwise if is_pointwise(name) and name not in _RANDOM | _PLACED else None


# ------------------------------------------------------------------------------------------------- element by element
def pointwise(call: KnownCall) -> Any:
    """An operation element by element runs on the constants themselves."""
    operands = call.tensors()
    if call.sized or "out" in call.kwargs or not all(x.any for x in operands) or not isinstance(call.out, torch.Tensor):
        return call.nothing()
    small = np.broadcast_shapes(*(x.sure.shape for x in operands))

    def fill(value: Any) -> Any:  # copies, as the operation may be in place
        if not isinstance(value, Known):
            return value
        return value.wide.expand(small).clone() if value.shape else value.wide.clone()

    args, kwargs = pytree.tree_map(fill, (tuple(call.args), dict(call.kwargs)), is_leaf=lambda v: isinstance(v, Known))
    try:
        result = call.run(*args, **kwargs)
    except Exception:  # it may want tensors of other dtypes or sizes: then nothing is known of it
        return call.nothing()
    if not isinstance(result, torch.Tensor) or result.shape != small:
        return call.nothing()
    return Known.where(call.out.shape, _and(x.sure for x in operands), result)


def _and(masks: Any) -> torch.Tensor:
    result = torch.ones((), dtype=torch.bool)
    for mask in masks:
        result = result & mask
    return result


def _product(call: KnownCall) -> Any:
    """Zero times anything is zero."""
    operands = call.tensors()
    if "out" in call.kwargs or not isinstance(call.out, torch.Tensor):
        return call.nothing()
    zero = ~_and(~x.zero for x in operands)
    known = pointwise(call)
    return Known.where(call.out.shape, known.sure | zero, torch.where(zero, 0.0, known.wide.double()))


def _choice(condition: Any, x: Any, y: Any, call: KnownCall) -> Any:
    x, y = (v if isinstance(v, Known) else _number(v) for v in (x, y))
    if x is None or y is None or call.sized or not isinstance(condition, Known):
        return call.nothing()
    chosen = condition.sure & torch.where(condition.value.bool(), x.sure, y.sure)
    same = x.sure & y.sure & (x.wide == y.wide)
    value = torch.where(condition.value.bool() & condition.sure, x.wide, y.wide)
    return Known.where(call.out.shape, chosen | same, torch.where(same, x.wide, value))


def _number(value: Any) -> Known | None:
    return Known.filled((), float(value)) if isinstance(value, (int, float)) else None


def _where(call: KnownCall) -> Any:
    if len(call.args) + len(call.kwargs) != 3:
        return call.nothing()
    if call.args and not isinstance(call.out, torch.Tensor):
        return call.nothing()
    return _choice(call.get(0, "condition"), call.get(1, "input", "self"), call.get(2, "other"), call)


def _masked_fill(call: KnownCall) -> Any:
    return _choice(call.get(1, "mask"), call.get(2, "value"), call.first(), call)


def _cast(call: KnownCall) -> Any:
    """To another dtype, which the result has, or to another device."""
    if not isinstance(call.out, torch.Tensor):
        return call.nothing()
    x = call.first()
    return Known.where(call.out.shape, x.sure, x.wide.to(call.out.dtype))


def _dropout(call: KnownCall) -> Any:
    """While training the zeros stay, except in an alpha dropout."""
    x = call.first()
    asked = call.get(2, "training", "train", default=True)
    active = bool(asked) if call.module is None else call.module.training
    if active and "alpha" in call.name:
        return call.nothing()
    return Known.where(x.shape, x.zero if active else x.sure, x.wide)


def _filled(value: float | None) -> Rule:
    """A new tensor; the number in it, or ``None`` if it is an argument."""

    def rule(call: KnownCall) -> Any:
        number = value if value is not None else call.get(2 if call.name == "new_full" else 1, "fill_value")
        if not isinstance(number, (int, float)) or (call.sized and value is None):
            return call.nothing()
        return pytree.tree_map_only(torch.Tensor, lambda t: Known.filled(t.shape, float(number)), call.out)

    return rule


def _copy(call: KnownCall) -> Any:
    source = call.get(1, "src", "other")
    if not isinstance(source, Known):
        return call.nothing()
    return Known.where(call.out.shape, *source.aligned(len(call.out.shape)))


# ------------------------------------------------------------------------------------------------- layers
_UNBATCHED = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}
"""The rank of an input without a batch, whose channels come first."""


def _mix(call: KnownCall) -> Any:
    mix = Mix.of(call)
    return call.nothing() if mix is None else mix.output(call.first().along(mix.dim), tuple(call.out.shape))


def _prelu(call: KnownCall) -> Any:
    x, weight = call.first(), call.get(1, "weight")
    if not isinstance(weight, Known) or not weight.all:
        return call.nothing()
    slope = weight.wide.reshape([-1 if d == min(1, len(x.shape) - 1) else 1 for d in range(len(x.shape))])
    return Known.where(x.shape, x.sure, torch.where(x.wide > 0, x.wide, slope * x.wide))


def _glu(call: KnownCall) -> Any:
    x = call.first()
    dim = call.dims(call.get(1, "dim", default=-1))[0]
    sure, value = x.expanded()
    (a_sure, b_sure), (a, b) = sure.chunk(2, dim), value.chunk(2, dim)
    zero = a_sure & (a == 0)
    return Known.shrunk(call.out.shape, zero | (a_sure & b_sure), torch.where(zero, 0.0, a * torch.sigmoid(b)))


def _norm(first: int) -> Rule:
    """Norms that end in ``weight`` and ``bias``, the weight at position ``first``. A channel whose weight is zero is
    its bias whatever comes in; a batch norm on fixed statistics is a map of each channel besides."""

    def rule(call: KnownCall) -> Any:
        x, weight, bias = call.first(), call.get(first, "weight"), call.get(first + 1, "bias")
        rank = len(x.shape)
        parameters = [p for p in (weight, bias) if isinstance(p, Known)]
        if not all(p.all for p in parameters) or any(
            type(call.module) is kind and rank == r for kind, r in _UNBATCHED.items()
        ):
            return call.nothing()

        def wide(p: Any, otherwise: float) -> torch.Tensor:
            value = p.wide if isinstance(p, Known) else torch.full((1,), otherwise, dtype=torch.float64)
            if call.name in ("layer_norm", "rms_norm"):
                return value
            return value.reshape([-1 if d == 1 else 1 for d in range(rank)])

        scale, shift = wide(weight, 1.0), wide(None if call.name == "rms_norm" else bias, 0.0)
        scale = scale.reshape((1,) * (rank - scale.dim()) + tuple(scale.shape))
        off, value = scale == 0, shift
        if call.name == "batch_norm" and not call.get(5, "training", default=False):
            mean, var = call.get(1, "running_mean"), call.get(2, "running_var")
            if not (isinstance(mean, Known) and isinstance(var, Known) and mean.all and var.all):
                return call.nothing()
            eps = call.get(7, "eps", default=1e-5) if call.module is None else float(call.module.eps)  # type: ignore[arg-type]
            slope = scale / torch.sqrt(wide(var, 1.0) + eps)
            value = torch.where(off, shift, slope * (x.wide - wide(mean, 0.0)) + shift)
            off = off | x.sure
        return Known.where(x.shape, off, value)

    return rule


def _embedding(call: KnownCall) -> Any:
    """A column that is the same in every row."""
    weight = call.get(1, "weight")
    if not isinstance(weight, Known) or not weight.all or getattr(call.module, "max_norm", None) is not None:
        return call.nothing()
    if call.module is None and call.get(3, "max_norm") is not None:
        return call.nothing()
    row = weight.wide[:1]
    small = [-1 if d == len(call.out.shape) - 1 else 1 for d in range(len(call.out.shape))]
    return Known.where(call.out.shape, (weight.value == weight.value[:1]).all(0).reshape(small), row.reshape(small))


# ------------------------------------------------------------------------------------------------- products, reductions
def _matmul(call: KnownCall) -> Any:
    """Rows and columns of zeros."""
    left, right = call.first(), call.get(1, "other", "mat2")
    if not isinstance(right, Known) or len(left.shape) < 2 or len(right.shape) < 2 or call.name == "rmatmul":
        return call.nothing()
    zero = left.zero.all(-1, keepdim=True) | right.zero.all(-2, keepdim=True)
    return Known.where(call.out.shape, zero, torch.zeros(()))


def _attention(call: KnownCall) -> Any:
    """A mean of the values of all places: where these are the same everywhere, that. With a mask a place may see
    nothing, and be zero."""
    value, rank = call.get(2, "value"), len(call.out.shape)
    sure, number = value.aligned(rank)
    if call.module is not None:
        drops = call.module.training and getattr(call.module, "dropout", 1.0) != 0
        mask = call.get(3, "attn_mask")
    else:
        drops, mask = call.get(4, "dropout_p", default=0.0) != 0, call.get(3, "attn_mask")
    zero = sure & (number == 0)
    if sure.shape[-2] != 1:
        zero, sure, number = (t.all(-2, keepdim=True) for t in (zero, zero, number == 0))
        number = torch.zeros(())
    if drops or mask is not None:
        sure, number = zero, torch.zeros(())
    if rank > 2 and sure.shape[-3] not in (1, call.out.shape[-3]):  # heads of values that several queries share
        times = call.out.shape[-3] // sure.shape[-3]
        sure = sure.repeat_interleave(times, -3)
        number = number.repeat_interleave(times, -3) if number.dim() else number
    return Known.where(call.out.shape, sure, number)


def _extremum(call: KnownCall) -> Any:
    """The larger or smaller of two tensors; of one nothing is known."""
    return pointwise(call) if isinstance(call.get(1, "other"), Known) else call.nothing()


def _mean(call: KnownCall) -> Any:
    """Of what is the same everywhere along the dimensions that are reduced; a sum only of zeros."""
    x, dims = call.first(), call.reduced()
    if not x.any or not x.shape or not isinstance(call.out, torch.Tensor):
        return call.nothing()
    even = "sum" not in call.name and all(x.sure.shape[d] == 1 for d in dims)
    sure = x.sure if even else x.zero
    sure, value = sure.all(dims, keepdim=True) if dims else sure, x.wide.amax(dims, keepdim=True) if dims else x.wide
    if call.out.dim() != len(x.shape):
        kept = [s for d, s in enumerate(sure.shape) if d not in dims]
        sure, value = sure.reshape(kept), value.reshape(kept)
    return Known.where(call.out.shape, sure, value)


RULES: Mapping[str, Rule] = {
    **MOVES,
    **SPACE,
    **dict.fromkeys(("mul", "rmul", "imul", "multiply"), _product),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys("to type float half bfloat16 double int long bool type_as cpu cuda".split(), _cast),
    **dict.fromkeys("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(), _dropout),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _filled(0.0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1.0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled(None)),
    "copy": _copy,
    **dict.fromkeys(MIXES, _mix),
    "prelu": _prelu,
    "glu": _glu,
    **dict.fromkeys(("batch_norm", "instance_norm"), _norm(3)),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _norm(2)),
    "embedding": _embedding,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("max", "min"), _extremum),
    **dict.fromkeys(("sum", "nansum", "mean", "nanmean", "amax", "amin"), _mean),
}
