"""Which range of a value is worth its integers: observers of activations on calibration data.

An observer streams over the values of a node and ends as a :class:`Seen`, which names a range for a grid:

==================  ====================================================================================================
``min-max``         from the least value seen to the greatest.
``moving-average``  averages of the least and the greatest of each batch, later ones weighing more (by 0.1; Jacob et al.
                    2018, arXiv 1712.05877, section 3.1).
``percentile``      all but one value in 100,000 at each end.
``mse``             the range with the least mean square of what rounding and clipping change.
``entropy``         the range whose rounded histogram is nearest to the histogram in relative entropy (Migacz 2017,
                    "8-bit inference with TensorRT").
==================  ====================================================================================================

The last three look at a histogram of 2,048 bins whose width doubles whenever a value falls outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcompress.passes.quantization.grid import Grid

__all__ = ["OBSERVERS", "RangeObserver", "Seen"]

_BINS = 2048
_TAIL = 1e-5
_DECAY = 0.1


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an observer knows of a value.

    Attributes:
        least, greatest: the range that it stands for; 0 and 0 if it saw nothing.
        finite: whether all elements were.
        count: how many elements were seen.
        histogram: counts of equal bins from ``least`` to ``greatest``, where one was kept.
        method: of choosing a range.
    """

    least: float
    greatest: float
    finite: bool
    count: int
    method: str
    histogram: Tensor | None = None

    def range(self, grid: Grid) -> tuple[float, float]:
        """Least and greatest value that are to be stood for exactly; what is outside is clipped."""
        if self.histogram is None or self.least == self.greatest:
            return self.least, self.greatest
        centres = self._centres()
        if self.method == "percentile":
            return _percentile(self.histogram, centres, self.least, self.greatest)
        candidates = _shrunk(self.least, self.greatest, grid)
        losses = _square_errors if self.method == "mse" else _divergences
        best = int(losses(self.histogram, centres, candidates, grid).argmin())
        return float(candidates[best, 0]), float(candidates[best, 1])

    def _centres(self) -> Tensor:
        assert self.histogram is not None
        width = (self.greatest - self.least) / len(self.histogram)
        return self.least + width * (torch.arange(len(self.histogram), dtype=torch.float64) + 0.5)


class RangeObserver:
    """An observer of floating-point tensors; several nodes may share one. See the module.

    Args:
        method: the name of one of the methods.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._least, self._greatest = math.inf, -math.inf
        self._count, self._finite = 0, True
        self._histogram = _Histogram() if method in ("percentile", "mse", "entropy") else None

    def update(self, value: Any) -> None:
        """Take in one value."""
        if not value.numel():
            return
        value = value.detach().float()
        least, greatest = (float(v) for v in torch.aminmax(value))
        if not (math.isfinite(least) and math.isfinite(greatest)):
            self._finite = False
            return
        if self._method == "moving-average" and self._count:
            self._least += _DECAY * (least - self._least)
            self._greatest += _DECAY * (greatest - self._greatest)
        else:
            self._least, self._greatest = min(self._least, least), max(self._greatest, greatest)
        self._count += value.numel()
        if self._histogram is not None:
            self._histogram.update(value, least, greatest)

    def _merge(self, other: RangeObserver) -> None:
        """Take in what ``other`` saw."""
        self._least, self._greatest = min(self._least, other._least), max(self._greatest, other._greatest)
        self._count, self._finite = self._count + other._count, self._finite and other._finite
        if self._histogram is not None and other._histogram is not None:
            self._histogram.merge(other._histogram)

    @property
    def merge(self) -> Callable[[RangeObserver], None]:
        """Take in what another one saw; a moving average has none, as it goes by the order."""
        if self._method == "moving-average":
            raise AttributeError("merge")
        return self._merge

    def result(self) -> Seen:
        """What was seen so far."""
        if not self._count:
            return Seen(0.0, 0.0, self._finite, 0, self._method)
        least, greatest, counts = self._least, self._greatest, None
        if self._histogram is not None:
            least, greatest, counts = self._histogram.trimmed(least, greatest)
        return Seen(least, greatest, self._finite, self._count, self._method, counts)


class _Histogram:
    """Counts of equal bins that grow with what they see; an edge of a bin always lies at zero, so that a value that is
    never negative is known to be so."""

    def __init__(self) -> None:
        self._width = 0.0  # of a bin; bins lie from -_BINS to _BINS of these
        self._counts = torch.zeros(2 * _BINS, dtype=torch.float64)

    def update(self, value: Tensor, least: float, greatest: float) -> None:
        largest = max(-least, greatest, torch.finfo(torch.float32).tiny)
        if not self._width:
            self._width = largest * (1 + 1e-6) / _BINS
        while largest > self._width * _BINS:
            self._double()
        edge = self._width * _BINS
        self._counts += torch.histc(value, 2 * _BINS, -edge, edge).cpu().double()

    def merge(self, other: _Histogram) -> None:
        """Add counts of bins of another width: each to the bin in which its middle lies."""
        if not other._width:
            return
        if not self._width:
            self._width, self._counts = other._width, other._counts.clone()
            return
        while self._width < other._width:
            self._double()
        middles = (torch.arange(2 * _BINS, dtype=torch.float64) + 0.5 - _BINS) * (other._width / self._width)
        self._counts.index_add_(0, (middles.floor().long() + _BINS), other._counts)

    def _double(self) -> None:
        merged = self._counts.view(-1, 2).sum(1)
        self._counts.zero_()
        self._counts[_BINS // 2 : _BINS // 2 + _BINS] = merged
        self._width *= 2

    def trimmed(self, least: float, greatest: float) -> tuple[float, float, Tensor]:
        """Edges and counts of the bins from the first to the last that could hold something."""
        first = _BINS + math.floor(min(least, 0.0) / self._width)
        last = _BINS + math.ceil(max(greatest, 0.0) / self._width)
        first, last = max(first, 0), min(max(last, first + 1), 2 * _BINS)
        return (first - _BINS) * self._width, (last - _BINS) * self._width, self._counts[first:last].clone()


# ------------------------------------------------------------------------------------------------- choosing a range
def _percentile(counts: Tensor, centres: Tensor, least: float, greatest: float) -> tuple[float, float]:
    share = counts.cumsum(0) / counts.sum()
    inside = torch.nonzero((share >= _TAIL) & (share - counts / counts.sum() <= 1 - _TAIL)).flatten()
    half = (greatest - least) / len(counts) / 2
    return min(float(centres[inside[0]]) - half, 0.0), max(float(centres[inside[-1]]) + half, 0.0)


def _shrunk(least: float, greatest: float, grid: Grid) -> Tensor:
    """Ranges within that from ``least`` to ``greatest``, of shape ``(candidates, 2)``."""
    parts = torch.linspace(0.05, 1.0, 96, dtype=torch.float64)
    if grid.is_signed:
        largest = max(-least, greatest)
        return torch.stack([-largest * parts, largest * parts], 1)
    both = torch.stack([least * parts, greatest * parts], 1)
    if not (least < 0 < greatest):
        return both
    below = torch.stack([least * parts, torch.full_like(parts, greatest)], 1)
    above = torch.stack([torch.full_like(parts, least), greatest * parts], 1)
    return torch.cat([both, below, above])


def _rounded(centres: Tensor, candidates: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = grid.scales(candidates[:, 0], candidates[:, 1])
    return grid.nearest(centres[None], scale[:, None], zero_point[:, None])


def _square_errors(counts: Tensor, centres: Tensor, candidates: Tensor, grid: Grid) -> Tensor:
    return ((_rounded(centres, candidates, grid) - centres).square() * counts).sum(1)


def _divergences(counts: Tensor, centres: Tensor, candidates: Tensor, grid: Grid) -> Tensor:
    """For each candidate the relative entropy of the clipped histogram to what its rounding leaves of it: the counts
    that fall on one integer are spread evenly over the bins that hold some of them.

    The bin that starts at zero counts as much as the next: every grid has zero, and what an activation function makes
    exactly zero would drown all else."""
    found = []
    counts = counts.clone()
    zero = int((centres - (centres[1] - centres[0]) / 2).abs().argmin())
    counts[zero] = counts[min(zero + 1, len(counts) - 1)]
    for rounded in _rounded(centres, candidates, grid):
        levels, place = torch.unique(rounded, return_inverse=True)
        on = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, place, counts)
        filled = torch.zeros_like(on).index_add_(0, place, (counts > 0).double())
        spread = (on / filled.clamp_min(1))[place] * (counts > 0)
        inside = (centres >= rounded.min()) & (centres <= rounded.max())
        p = torch.where(inside, counts, 0.0)
        p[int(inside.nonzero()[0])] += counts[centres < rounded.min()].sum()
        p[int(inside.nonzero()[-1])] += counts[centres > rounded.max()].sum()
        q = torch.where(inside, spread, 0.0)
        some = (p > 0) & (q > 0)
        lost = p[(p > 0) & (q <= 0)].sum() / p.sum()
        p, q = p[some] / p.sum(), q[some] / q.sum().clamp_min(1e-300)
        found.append((p * (p / q).log()).sum() + lost)
    return torch.stack(found)


OBSERVERS = ("min-max", "moving-average", "percentile", "mse", "entropy")
