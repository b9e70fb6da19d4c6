"""Rounding weights so that the layer's output changes least, not each weight.

To the nearest integers is not best: what matters is the mean square of ``(W - W') x`` over the inputs x of the layer,
``tr((W - W') C (W - W')')`` with C their second moment (Nagel et al. 2020, "Up or down? Adaptive rounding for
post-training quantization", arXiv 2004.10568, equation 12; with C the covariance where the bias takes up the mean, as
it does here). AdaRound relaxes the choice between up and down and descends by gradients. Since C says all there is to
know, the choice can be improved directly: start by rounding one column after the other, each making up for what was
lost in those before it (Frantar et al. 2023, arXiv 2210.17323), then let every weight in turn take the best integer
given all others, which never makes it worse, until next to none moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.passes.quantization.grid import Grid

__all__ = ["adaptive"]

_SWEEPS = 10
_DAMPING = 0.01


def adaptive(rows: Tensor, scale: Tensor, grid: Grid, weighting: Tensor) -> Tensor:
    """The integers for ``rows``.

    Args:
        rows: the weight, ``(groups * outputs, columns)``; float64.
        scale: of each element, of that shape or one that broadcasts to it.
        grid: of the integers; its zero point is 0.
        weighting: ``C``, ``(groups, columns, columns)``.

    Returns:
        Integers as floating-point numbers, of the shape of ``rows``.
    """
    groups = len(weighting)
    target = (rows / scale).reshape(groups, -1, rows.shape[1])
    step = scale.expand_as(rows).reshape(target.shape)
    chosen = _fed_forward(target, step, grid, weighting)
    return _descended(chosen, target, step, grid, weighting).reshape(rows.shape)


def _fed_forward(target: Tensor, step: Tensor, grid: Grid, weighting: Tensor) -> Tensor:
    """Column by column, later columns making up for what earlier ones lost."""
    damped = weighting + _DAMPING * torch.diag_embed(
        weighting.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(weighting.shape[:2])
    )
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left = target * step
    chosen = torch.empty_like(target)
    for j in range(target.shape[2]):
        chosen[..., j] = torch.round(left[..., j] / step[..., j]).clamp(grid.low, grid.high)
        lost = (left[..., j] - chosen[..., j] * step[..., j]) / inverse[:, None, j, j]
        left[..., j:] -= lost[..., None] * inverse[:, None, j, j:]
    return chosen


def _descended(chosen: Tensor, target: Tensor, step: Tensor, grid: Grid, weighting: Tensor) -> Tensor:
    """Every weight in turn to its best integer, the others being as they are."""
    pull = ((chosen - target) * step) @ weighting  # half the gradient
    own = weighting.diagonal(dim1=1, dim2=2)
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(_SWEEPS):
        moved = 0
        for j in range(target.shape[2]):
            wanted = chosen[..., j] - torch.round(pull[..., j] / (own[:, None, j] * step[..., j]).clamp_min(tiny))
            change = wanted.clamp(grid.low, grid.high) - chosen[..., j]
            count = int((change != 0).sum())
            if count:
                moved += count
                chosen[..., j] += change
                pull += (change * step[..., j])[..., None] * weighting[:, None, j]
        if moved <= 1e-3 * chosen.numel():
            break
    return chosen
