"""Whether a module of unknown code acts element by element: found by letting it run on NaN."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["acts_elementwise", "keeps_zero"]

_TRIALS = 6


def acts_elementwise(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether each element of ``module(x)`` depends on no other element of ``x`` than its own.

    NaN goes through arithmetic: with a random half of the elements set to NaN, whatever depends on one of these becomes
    NaN too. Tried several times with other halves, in training and in evaluation mode. Only modules without parameters
    and buffers are tried, such as stochastic depth and activations that a library brings along.
    """
    if not x.is_floating_point() or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module)
    for trial in range(_TRIALS):
        twin.train(trial % 2 == 0)
        poisoned = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
        values = torch.randn(x.shape, generator=generator).to(x)
        out = _run(twin, values.masked_fill(poisoned, torch.nan))
        if out is None or out.shape != x.shape or bool((out.isnan() & ~poisoned).any()):
            return False
    return True


def keeps_zero(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether ``module`` gives zero where it is given zero, in both modes."""
    twin = copy.deepcopy(module)
    outs = [_run(twin.train(mode), torch.zeros_like(x)) for mode in (True, False)]
    return all(out is not None and not bool(out.any()) for out in outs)


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        out = module(x)
    except Exception:  # it may want something else than a tensor of such values: then nothing is known of it
        return None
    return out if isinstance(out, torch.Tensor) and out.is_floating_point() else None
