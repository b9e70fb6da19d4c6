"""Bounds of values, whatever a graph is given: what a clamp leaves, and what linear layers make of that.

A channel whose largest value before a ReLU is not positive is zero behind it. Bounds come from activations (nothing
leaves a ReLU6 below 0 or above 6) and go on through layers as in interval arithmetic: a sum of products is largest
where each positive weight meets the largest input and each negative one the smallest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcompress.passes.pruning.known import Known, KnownCall
from fxcompress.passes.pruning.known_shapes import joined
from fxcompress.passes.pruning.mixing import MIXES, Mix

__all__ = ["within_bounds"]

Bounds = tuple[torch.Tensor, torch.Tensor]
Rule = Callable[[KnownCall], Bounds | None]

_NEVER_FALL = frozenset(
    """
    relu relu6 hardtanh clamp clip sigmoid hardsigmoid tanh elu selu softplus exp identity contiguous clone detach
""".split()
)
"""Functions that are never smaller for a larger argument."""


def within_bounds(call: KnownCall, found: Any) -> Any:
    """``found``, what is sure of the result of ``call``, with its bounds, and sure where these meet."""
    rule = _RULES.get(call.name)
    real = isinstance(call.out, torch.Tensor) and call.out.is_floating_point()
    if rule is None or not isinstance(found, Known) or not real or call.sized or "out" in call.kwargs:
        return found
    bounds = rule(call)
    if bounds is None or not bool((bounds[0].isfinite() | bounds[1].isfinite()).any()):
        return found
    low, high = bounds
    met = low == high
    value = torch.where(found.sure, found.wide.double(), low)
    return dataclasses.replace(Known.where(found.shape, found.sure | met, value), bounds=(low, high))


def _rising(call: KnownCall) -> Bounds | None:
    """Runs on both bounds; which bounds there are may only follow now."""
    operands = call.tensors()
    if len(operands) != 1:
        return None
    x = operands[0]
    name = next((k for k, v in call.kwargs.items() if v is x), None)
    try:
        if name is None:
            low, high = (call.run(t.clone(), *call.args[1:], **call.kwargs) for t in x.range)
        else:
            low, high = (call.run(*call.args, **{**call.kwargs, name: t.clone()}) for t in x.range)
    except Exception:  # it may want another dtype: then nothing is known of it
        return None
    return None if bool((low > high).any() | low.isnan().any() | high.isnan().any()) else (low, high)


def _dropout(call: KnownCall) -> Bounds | None:
    asked = call.get(2, "training", "train", default=True)
    active = bool(asked) if call.module is None else call.module.training
    return None if active or not call.first().bounded else call.first().range


def _mix(call: KnownCall) -> Bounds | None:
    x = call.first()
    mix = Mix.of(call) if x.bounded else None
    if mix is None:
        return None
    ranges = []
    for side, least in zip(x.range, (torch.amin, torch.amax), strict=True):
        rows = side.movedim(mix.dim, 0).reshape(side.shape[mix.dim], -1)
        ranges.append(least(rows, 1).expand(x.shape[mix.dim]))
    small = [-1 if d == mix.dim else 1 for d in range(len(call.out.shape))]
    low, high = mix.range(*ranges)
    return low.reshape(small), high.reshape(small)


def _batch_norm(call: KnownCall) -> Bounds | None:
    x, parameters = call.first(), [call.get(i, n) for i, n in enumerate(("mean", "var", "weight", "bias"), start=1)]
    if not x.bounded or call.get(5, "training", default=False) or call.module is None:
        return None
    if not all(isinstance(p, Known) and p.all for p in parameters):
        return None
    shape = [-1 if d == 1 else 1 for d in range(len(x.shape))]
    mean, var, weight, bias = (p.wide.reshape(shape) for p in parameters)
    slope = weight / torch.sqrt(var + float(call.module.eps))  # type: ignore[arg-type]
    ends = [torch.where(slope == 0, bias, slope * (side - mean) + bias) for side in x.range]
    return torch.minimum(*ends), torch.maximum(*ends)


_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _pool(call: KnownCall) -> Bounds | None:
    """Something between the least and the greatest; to an average zeros beyond the border may count."""
    x, averages = call.first(), call.name.startswith("avg")
    if not x.bounded or (averages and type(call.module) not in _AVERAGES):
        return None
    low, high = x.range
    if any(side.shape[d] != 1 for side in (low, high) for d in range(-int(call.name[-2]), 0)):
        return None
    if not averages:
        return low, high
    plain = getattr(call.module, "divisor_override", None) is None
    return (low.clamp(max=0), high.clamp(min=0)) if plain else None


def _sum(call: KnownCall) -> Bounds | None:
    operands = call.tensors()
    if len(operands) != 2 or call.kwargs or len(call.args) != 2:
        return None
    (a, b), (c, d) = operands[0].range, operands[1].range
    low, high = a + c, b + d
    return low.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), high.nan_to_num(
        nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
    )


def _product(call: KnownCall) -> Bounds | None:
    operands = call.tensors()
    if len(operands) != 2 or call.kwargs or len(call.args) != 2 or not all(x.bounded for x in operands):
        return None
    ends = [torch.where((a == 0) | (b == 0), 0.0, a * b) for a in operands[0].range for b in operands[1].range]
    low, high = ends[0], ends[0]
    for end in ends[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return low, high


def _cat(call: KnownCall) -> Bounds | None:
    given = call.get(0, "tensors", "input")
    if not isinstance(given, (tuple, list)) or not any(x.bounded for x in given):
        return None
    dim = int(call.get(1, "dim", "axis", default=0)) % len(call.out.shape)
    parts = [x for x in given if x.shape != (0,)]
    low, high = joined([x.range for x in parts], [x.shape[dim] for x in parts], dim)
    return low, high


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_NEVER_FALL, _rising),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **dict.fromkeys(MIXES, _mix),
    "batch_norm": _batch_norm,
    **{f"{kind}_pool{d}d": _pool for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    **dict.fromkeys(("add", "iadd", "radd"), _sum),
    **dict.fromkeys(("mul", "imul", "rmul"), _product),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
}
