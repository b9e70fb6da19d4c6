"""Weights as integers: scales for a tensor, for each output channel, or for each group of inputs of a channel."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fxcompress.layers import Layer, as_stored, by_group, channel_counts
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.rounding import adaptive

__all__ = [
    "Granularity",
    "IntegerWeight",
    "missing_rows",
    "real_rows",
    "relative_norm",
    "rows_as_integers",
    "rows_as_weight",
    "weight_as_integers",
]

_BLOCK = 2**18
"""Elements whose scales are chosen at a time."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Granularity: TypeAlias = Literal["tensor", "channel"] | int


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers.

    Attributes:
        integers: of the shape of the weight, int8.
        scale: float32; one for each output channel, or for each group ``(channels * groups,)``.
        grid: where the integers lie.
        axis: along which channels lie; ``None`` if there is a scale for each group.
        group: how many elements of a row have a scale; 0 if all.
        error: relative to the norm of the weight.
    """

    integers: Tensor
    scale: Tensor
    grid: Grid
    axis: int | None
    group: int
    error: float


def _rows_of(layer: Layer, weight: Tensor) -> Tensor:
    """``weight``, of the shape of that of ``layer``, with a row for each output channel; a view if it can be one."""
    return by_group(layer, weight).flatten(0, 1).flatten(1)


def rows_as_weight(layer: Layer, rows: Tensor) -> Tensor:
    """Rows, one for each output channel, in the shape of the weight of ``layer``."""
    groups, outputs, inputs = channel_counts(layer)
    return as_stored(layer, rows.reshape(groups, outputs // groups, inputs // groups, -1))


def weight_as_integers(
    layer: Layer,
    grid: Grid,
    granularity: Granularity,
    weighting: Tensor | None = None,
    target: Tensor | None = None,
) -> IntegerWeight:
    """The weight of ``layer`` as integers.

    Scales are those with the least square error among 65 that clip more and more; where channels of a transposed
    convolution in groups cannot have scales of their own, which the operators have no word for, there is one for all.

    Args:
        layer: the layer.
        grid: of the integers.
        granularity: what has a scale of its own.
        weighting: if given, rounding is adaptive (see ``rounding.py``): ``(groups, columns, columns)``, what counts of
            a change of the weight.
        target: what to round in place of the weight, a row for each output channel; float64.
    """
    axis = _axis(layer)
    rows = _real_rows(layer) if target is None else target
    group = granularity if isinstance(granularity, int) and granularity < rows.shape[1] else 0
    if group and (rows.shape[1] % group or isinstance(layer, _TRANSPOSED)):  # whose rows lie across the weight
        group = 0
    parts = rows.reshape(-1, group) if group else rows
    importance = None if weighting is None else _importance(weighting, rows).reshape(parts.shape)
    if granularity == "tensor" or axis is None:
        whole = None if importance is None else importance.reshape(1, -1)
        scale = _best_scale(rows.reshape(1, -1), grid, whole).expand(len(rows))
    else:
        scale = _best_scale(parts, grid, importance)
    if weighting is None:
        integers = grid.round(parts, scale[:, None]).reshape(rows.shape)
    else:
        integers = adaptive(rows, scale[:, None].expand_as(parts).reshape(rows.shape), grid, weighting)
    missing = integers.reshape(parts.shape) * scale[:, None] - parts
    return IntegerWeight(
        integers=rows_as_weight(layer, integers).to(layer.weight.device, torch.int8),
        scale=_scales(layer, scale, axis).to(layer.weight.device, torch.float32),
        grid=grid,
        axis=None if group else (0 if axis is None else axis),
        group=group,
        error=relative_norm(missing, rows),
    )


def real_rows(layer: Layer, weight: IntegerWeight) -> Tensor:
    """What ``weight``, of ``layer``, stands for, a row for each output channel; float64."""
    integers = _rows_of(layer, weight.integers.to("cpu", torch.float64))
    scale = weight.scale.to("cpu", torch.float64)
    if weight.group:
        return (integers.reshape(-1, weight.group) * scale[:, None]).reshape(integers.shape)
    return integers * (scale[:, None] if len(scale) == len(integers) else scale[0])


def missing_rows(layer: Layer, weight: IntegerWeight) -> Tensor:
    """The weight of ``layer`` less what ``weight`` stands for, a row for each output channel; float64."""
    return _real_rows(layer) - real_rows(layer, weight)


def _real_rows(layer: Layer) -> Tensor:
    return _rows_of(layer, layer.weight.detach().to("cpu", torch.float64))


def rows_as_integers(matrix: Tensor, grid: Grid) -> tuple[Tensor, Tensor, float]:
    """A matrix as integers, int8, with a scale for each row, of its own dtype; and the error relative to its norm."""
    rows = matrix.to("cpu", torch.float64)
    scale = _best_scale(rows, grid).to(matrix.dtype).double()
    integers = grid.round(rows, scale[:, None])
    error = relative_norm(integers * scale[:, None] - rows, rows)
    return integers.to(matrix.device, torch.int8), scale.to(matrix.device, matrix.dtype), error


def relative_norm(missing: Tensor, whole: Tensor) -> float:
    """The norm of ``missing`` relative to that of ``whole``."""
    return float(missing.norm()) / max(float(whole.norm()), torch.finfo(torch.float64).tiny)


def _importance(weighting: Tensor, rows: Tensor) -> Tensor:
    """What counts of each weight by itself, of the shape of ``rows``."""
    each = weighting.diagonal(dim1=1, dim2=2)
    return each.repeat_interleave(len(rows) // len(each), dim=0)


def _axis(layer: Layer) -> int | None:
    """The dimension of the weight along which there are all output channels."""
    if not isinstance(layer, _TRANSPOSED):
        return 0
    return 1 if layer.groups == 1 else None


def _scales(layer: Layer, scale: Tensor, axis: int | None) -> Tensor:
    if axis is None:  # the same for all, written along the first dimension
        return scale[:1].expand(layer.weight.shape[0]).clone()
    return scale.clone()


def _best_scale(rows: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """For each row the scale, exact in float32, whose rounding has the least (weighted) square error. Errors are
    compared in float32, and for as many rows at a time as stay in a cache."""
    count = max(_BLOCK // max(rows.shape[1], 1), 1)
    blocks = (slice(start, start + count) for start in range(0, len(rows), count))
    return torch.cat([_best_scale_of_few(rows[b], grid, None if importance is None else importance[b]) for b in blocks])


def _best_scale_of_few(rows: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    exact, weight = rows.float(), None if importance is None else importance.float()
    buffer = torch.empty_like(exact)

    def error(scale: Tensor) -> Tensor:
        step = scale.float()[:, None]
        torch.div(exact, step, out=buffer)
        buffer.round_().clamp_(grid.low, grid.high).mul_(step).sub_(exact).square_()
        return (buffer if weight is None else buffer.mul_(weight)).sum(1)

    largest = rows.abs().amax(1)
    best = grid.scales(-largest, largest)[0]
    least = error(best)
    for part in torch.linspace(0.3, 0.99, 64, dtype=torch.float64):
        scale = grid.scales(-largest * part, largest * part)[0]
        found = error(scale)
        better = found < least
        best, least = torch.where(better, scale, best), torch.where(better, found, least)
    return best
