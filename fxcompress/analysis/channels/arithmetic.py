"""Rules for operations element by element, reductions, norms, and what acts on places in space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels.call import Call, Rule
from fxcompress.analysis.channels.maps import Grouping, Labelled

__all__ = ["REDUCTIONS", "RULES", "is_pointwise", "pointwise"]


# ------------------------------------------------------------------------------------------------- element by element
_ALSO_POINTWISE = frozenset(
    """
    truediv floordiv mod rtruediv rdiv rsub radd rmul pos invert and or xor relu6 hardtanh dropout dropout1d dropout2d
    dropout3d alpha_dropout feature_alpha_dropout clone contiguous to type float half bfloat16 double int long bool
    detach alias type_as masked_fill where clamp clip softplus softsign tanhshrink hardshrink softshrink
    threshold rrelu logsigmoid zeros_like ones_like empty_like full_like rand_like randn_like bernoulli
    nan_to_num cpu cuda requires_grad data real imag fill zero copy div true_divide float_power gelu silu mish elu selu
    celu hardswish hardsigmoid leaky_relu identity alpha_dropout lift_fresh rsqrt native_dropout
""".split()
)
_PRODUCTS = frozenset("mul rmul imul multiply and div truediv true_divide floordiv floor_divide".split())
_SUMS = frozenset("add radd iadd sub rsub subtract neg pos copy where lerp maximum minimum addcmul".split())
_ZERO_AT_ZERO = frozenset(
    """
    relu relu6 gelu silu mish elu selu celu hardswish leaky_relu tanh sin asin atan sinh asinh abs sqrt square sign neg
    dropout dropout1d dropout2d dropout3d clone contiguous type float half bfloat16 double detach alias
    softsign tanhshrink hardshrink softshrink prelu rrelu zeros_like expm1 log1p erf round floor ceil trunc real
    nan_to_num data identity feature_alpha_dropout zero
""".split()
)


def is_pointwise(name: str) -> bool:
    """Whether PyTorch says of the operator of this name that it acts element by element."""
    if name in _ALSO_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is None or not hasattr(packet, "overloads"):  # torch.ops.aten.name is the name of the namespace
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def pointwise(call: Call) -> Any:
    """Any operation element by element: what it combines goes together."""
    operands = call.tensors()
    found = call.labels.elementwise(operands) if len(operands) > 1 else operands[0]
    return call.same(found, _stays_zero(call, [call.labels.zero_wherever(x, found) for x in operands]))


def _like_first(call: Call) -> Any:
    """``x.to(y)``, ``x.type_as(y)``: of y only dtype and device count."""
    return call.same(call.first())


def _prelu(call: Call) -> Any:
    """The weight lies along dimension 1, or is one for all."""
    x, weight = call.first(), call.get(1, "weight")
    shape = [-1 if d == min(1, len(x.shape) - 1) else 1 for d in range(len(x.shape))]
    wide = call.labels.move([weight], lambda t: t.reshape(shape)) if weight.maps else Labelled((1,), (), weight.why)
    return call.same(call.labels.elementwise([x, wide]), x.zero)


def _stays_zero(call: Call, zeros: list[bool]) -> bool:
    """Whether the result is zero wherever atoms go, if ``zeros`` says it of the operands."""
    if call.name in _PRODUCTS:
        first = next(v for v in pytree.tree_leaves(list(call.args), is_leaf=lambda v: isinstance(v, Labelled)))
        if call.name in ("mul", "rmul", "imul", "multiply"):
            return any(zeros)
        return isinstance(first, Labelled) and zeros[0]
    if call.name in _SUMS:
        numbers = [v for v in pytree.tree_leaves(list(call.real_args)) if isinstance(v, (int, float))]
        return all(zeros) and not any(numbers)
    if call.name == "masked_fill":
        return zeros[0] and call.get(2, "value") == 0
    if call.name == "pow":
        exponent = call.get(1, "exponent")
        return zeros[0] and isinstance(exponent, (int, float)) and exponent > 0
    return call.name in _ZERO_AT_ZERO and zeros[0]


# ------------------------------------------------------------------------------------------------- reductions
REDUCTIONS = frozenset(
    """
    sum nansum mean nanmean amax amin max min prod std var norm vector_norm logsumexp argmax argmin any all median
    nanmedian count_nonzero std_mean var_mean aminmax mode
""".split()
)
_DIM_POSITION = {"norm": 2, "vector_norm": 2}


def _reduction(call: Call) -> Any:
    second = call.get(1, "other")
    if call.name in ("max", "min") and isinstance(second, Labelled):  # of two tensors
        return pointwise(call)
    position = _DIM_POSITION.get(call.name, 1)
    dim = call.get(position, "dim", "axis")
    if isinstance(dim, bool):  # std(x, unbiased)
        dim = None
    x = call.first()
    dims = call.dims(dim)
    ranks = {t.dim() for t in pytree.tree_leaves(call.out) if isinstance(t, torch.Tensor)}
    drop = ranks != {len(x.shape)} or not x.shape
    found = call.labels.spread(x, dims, drop=drop and bool(x.shape), exact=_ignores_zeros(call))
    return call.same(found)


def _ignores_zeros(call: Call) -> bool:
    order = call.get(1, "p", "ord", default=2)
    positive = order in (None, "fro") or (isinstance(order, (int, float)) and order > 0)
    return call.name in ("sum", "nansum") or (call.name in ("norm", "vector_norm") and positive)


def _along_dim(position: int, default: Any = None, frozen: bool = False, zero: bool = False) -> Rule:
    """Functions along a dimension that keep the shape: softmax, sorting, cumulative sums."""

    def rule(call: Call) -> Any:
        x = call.first()
        dims = set(call.dims(call.get(position, "dim", "axis", default=default)))
        if frozen:
            x = call.labels.freeze_along(x, dims, f"in the order of {call.labels.place}")
        else:
            if not (zero and x.zero):
                call.labels.inexact_along(x, dims)
        return call.same(x, zero and x.zero)

    return rule


def _triangle(call: Call) -> Any:
    """tril and triu: what lies where along the last two dimensions says what stays."""
    x = call.first()
    last = {len(x.shape) - 2, len(x.shape) - 1}
    return call.same(call.labels.freeze_along(x, last, f"in the order of {call.labels.place}"))


def _glu(call: Call) -> Any:
    dim = call.dim(call.get(1, "dim", default=-1))
    halves = call.labels.move([call.first()], lambda t: t.chunk(2, dim))
    return call.same(call.labels.elementwise(halves, halves[0].zero))


# ------------------------------------------------------------------------------------------------- norms
def _affine(call: Call, x: Labelled, weight: Any, bias: Any, dims: list[int]) -> Any:
    """``x``, normalised, times weight plus bias, both of which lie along ``dims``."""
    for parameter in (weight, bias):
        x = _combined(call, x, parameter, dims)
    zero = isinstance(weight, Labelled) and weight.zero
    alone = all(m.dims <= set(dims) or call.labels.atoms.are_frozen(m.ids.ravel()) for m in x.maps)
    return call.same(x, zero and alone)


def _combined(call: Call, x: Labelled, parameter: Any, dims: list[int]) -> Labelled:
    """``x`` with a parameter, if there is one, that lies along ``dims``."""
    if not isinstance(parameter, Labelled):
        return x
    shape = tuple(s if d in dims else 1 for d, s in enumerate(x.shape))
    if len(dims) == 1 and len(parameter.shape) == 1:
        maps = tuple(call.labels.along(m.ids, dims[0], len(shape)) for m in parameter.maps)
        wide = dataclasses.replace(parameter, shape=shape, maps=maps)
    else:
        wide = call.labels.move([parameter], lambda t: t.reshape(shape))
    return call.labels.elementwise([x, wide], x.zero)


def _batch_norm(call: Call) -> Any:
    x, (mean, var, weight, bias) = call.first(), (call.get(i, n) for i, n in enumerate(
        ("running_mean", "running_var", "weight", "bias"), start=1
    ))  # fmt: skip
    training = bool(call.get(5, "training", default=False)) or not isinstance(mean, Labelled)
    if training:
        call.labels.inexact_along(x, [d for d in range(len(x.shape)) if d != 1])
    for statistic in (mean, var):
        x = _combined(call, x, statistic, [1])
    if weight is None:  # (0 - mean) / std is not zero
        return call.same(x, False)
    return _affine(call, x, weight, bias, [1])


def _weight_norm(call: Call) -> Any:
    """v g / ||v||, the norm over all dimensions but ``dim``, along which g lies."""
    v, g = call.first(), call.get(1, "g")
    dim = call.dim(call.get(2, "dim", default=0))
    call.labels.inexact_along(v, [d for d in range(len(v.shape)) if d != dim])
    return call.same(call.labels.elementwise([v, g]), v.zero)


def _instance_norm(call: Call) -> Any:
    x = call.first()
    zero = x.zero
    call.labels.inexact_along(x, range(2, len(x.shape)))
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (call.get(i, n) for i, n in enumerate(names, start=1))
    out = _affine(call, _affine(call, x, mean, var, [1]), weight, bias, [1])
    return dataclasses.replace(out, zero=zero if weight is None and mean is None else out.zero)


def _layer_norm(call: Call) -> Any:
    x = call.first()
    count = len(call.get(1, "normalized_shape"))
    dims = list(range(len(x.shape) - count, len(x.shape)))
    call.labels.inexact_along(x, dims)
    return _affine(call, x, call.get(2, "weight"), call.get(3, "bias") if call.name == "layer_norm" else None, dims)


def _group_norm(call: Call) -> Any:
    x, groups = call.first(), int(call.get(1, "num_groups"))
    call.labels.inexact_along(x, range(2, len(x.shape)))
    ids = call.labels.vector(x, 1).reshape(groups, -1)
    call.labels.group(Grouping(ids, ids, x.why, call.labels.place, exact=False))
    return _affine(call, x, call.get(2, "weight"), call.get(3, "bias"), [1])


def _local_response_norm(call: Call) -> Any:
    call.labels.inexact_along(call.first(), [1])
    return call.same(call.first())


# ------------------------------------------------------------------------------------------------- space
def _spatial(call: Call) -> Any:
    """Pooling and resizing: works on the last dimensions, and on everything before them one by one."""
    x = call.first()
    rank = len(x.shape)
    space = next((int(d) for d in "123" if call.name.endswith(f"{d}d")), rank - 2)
    last = set(range(rank - space, rank))
    found = call.labels.freeze_along(x, last, f"a place in space for {call.labels.place}")
    for other in call.tensors()[1:]:
        call.labels.freeze(other, f"a place in space for {call.labels.place}")
    return call.same(found)


_SPATIAL = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate
    upsample upsample_bilinear upsample_nearest grid_sample max_unpool2d fractional_max_pool2d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
"""


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "gumbel_softmax"), _along_dim(1)),
    "normalize": _along_dim(2, 1, zero=True),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), _along_dim(1, frozen=True)),
    **dict.fromkeys(("sort", "argsort", "msort"), _along_dim(1, -1, frozen=True)),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("to", "type_as"), _like_first),
    "glu": _glu,
    "prelu": _prelu,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("weight_norm", "weight_norm_interface"), _weight_norm),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "local_response_norm": _local_response_norm,
    **dict.fromkeys(_SPATIAL.split(), _spatial),
}
