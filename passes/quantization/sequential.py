"""Rounding the weights of one layer after the other, each making up for what those before it changed.

Of each layer the sweep (``fxcompress/sweep.py``) shows what it reads now, behind layers that are rounded already, and
what it gave in the original network. The least squares of ``fxcompress/analysis/refit.py`` turn both into the real
weights W + D that would do best, with a ridge that was chosen on held-out samples. What rounding them to W' costs is
then

    tr (W + D - W') (G + ridge I) (W + D - W')'

exactly (the objective of the least squares is quadratic and W + D its minimum), which ``rounding.py`` makes small; the
bias takes up the mean. Nagel et al. 2020 (arXiv 2004.10568, section 3.4) call the target asymmetric.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.moments import second_moment_fits
from fxcompress.analysis.patches import READABLE
from fxcompress.analysis.refit import NotRefitted, refit
from fxcompress.layers import CalledLayer, Layer
from fxcompress.pass_base import Example
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.weights import (
    Granularity,
    IntegerWeight,
    real_rows,
    rows_as_weight,
    weight_as_integers,
)
from fxcompress.sweep import Sweep

__all__ = ["Rounded", "SequentialRounding", "has_moments"]

_LEAST_RIDGE = 0.1
"""Rounding errs in all directions, also in those that the data do not show: less of a ridge lets it err there. On 4-bit
weights of EfficientNet-Lite0 less was worse on photographs that were not calibrated on, and no better on others."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """A weight as integers, the bias that goes with it, and what there is to say of them."""

    weight: IntegerWeight
    bias: Tensor | None
    detail: dict[str, Any]


def has_moments(called: CalledLayer[Layer]) -> bool:
    """Whether the second moments of what a layer reads fit in memory."""
    return second_moment_fits(getattr(called.layer, "groups", 1), math.prod(called.layer.weight.shape[1:]))


class SequentialRounding:
    """Rounds the layers of ``gm``. To be made before anything in it is changed, and told of all layers in graph order.

    Args:
        gm: the graph.
        batches: calibration data.
    """

    def __init__(self, gm: fx.GraphModule, batches: Iterable[Example]) -> None:
        self._sweep = Sweep(gm, batches)

    @staticmethod
    def takes(called: CalledLayer[Layer]) -> bool:
        """Whether it can say what a layer should be: one that is called once and whose moments fit in memory."""
        return isinstance(called.layer, READABLE) and len(called.calls) == 1 and has_moments(called)

    def round(self, called: CalledLayer[Layer], grid: Grid, granularity: Granularity) -> Rounded | None:
        """The weight and bias for a layer, once values are rounded; ``None`` if :meth:`takes` says no, or the data say
        nothing. Then :meth:`put` is to be called."""
        self._sweep.begin()
        layer = called.layer
        if not isinstance(layer, READABLE) or not self.takes(called):
            return None
        twin, values = self._sweep.until(called.calls[0])
        assert isinstance(twin, READABLE)
        try:
            found = refit(twin, values)
        except NotRefitted:
            return None
        sums, change = found.sums(), found.change(_LEAST_RIDGE)
        ridge = _LEAST_RIDGE if found.ridge is None else max(found.ridge, _LEAST_RIDGE)
        weighting = sums.gram.clone()
        diagonal = weighting.diagonal(dim1=1, dim2=2)
        means = diagonal.mean(1, keepdim=True)
        if not bool((means > 0).all()):  # constant: the bias says it all
            return None
        diagonal += ridge * means
        target = found.weight if change is None else found.weight + change[0]
        weight = weight_as_integers(layer, grid, granularity, weighting, target.mT.flatten(0, 1).cpu())
        moved = real_rows(layer, weight).reshape(target.mT.shape).mT - found.weight
        shift = sums.shift(moved)
        bias = None if layer.bias is None else (layer.bias.detach().double() + shift.flatten()).to(layer.bias.dtype)
        error = found.relative(sums.error(moved, shift))
        return Rounded(weight, bias, {"rounding": "adaptive", "ridge": ridge, "output_error": error})

    def put(self, called: CalledLayer[Layer], weight: IntegerWeight, bias: Tensor | None) -> None:
        """Let the layers to come see this one as it now is."""
        twin: Any = self._sweep.begin().get_submodule(called.path)
        with torch.no_grad():
            twin.weight.copy_(rows_as_weight(called.layer, real_rows(called.layer, weight)))
            if bias is not None:
                twin.bias.copy_(bias)
