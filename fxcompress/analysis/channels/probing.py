"""Whether a module of unknown code acts element by element: found by letting it run on NaN."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["acts_elementwise", "keeps_zero"]


def acts_elementwise(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether each element of ``module(x)`` depends on no other element of ``x`` than its own.

    NaN goes through arithmetic: with a random half of the elements set to NaN, whatever depends on one of these becomes
    NaN too. Tried with one half and then with the other (so that an element that all others depend on is in one of
    them), in training and in evaluation mode. Only modules without parameters and buffers are tried, such as stochastic
    depth and activations that a library brings along. Of ``x`` only shape, dtype and device count.
    """
    if not x.is_floating_point() or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module)
    device = _device(x)
    half = (torch.rand(x.shape, generator=generator) < 0.5).to(device)
    values = torch.randn(x.shape, generator=generator).to(device, x.dtype)
    for mode in (True, False):
        twin.train(mode)
        for poisoned in (half, ~half):
            out = _run(twin, values.masked_fill(poisoned, torch.nan))
            if out is None or out.shape != x.shape or bool((out.isnan() & ~poisoned).any()):
                return False
    return True


def keeps_zero(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether ``module`` gives zero where it is given zero, in both modes."""
    twin = copy.deepcopy(module)
    outs = [_run(twin.train(mode), torch.zeros_like(x, device=_device(x))) for mode in (True, False)]
    return all(out is not None and not bool(out.any()) for out in outs)


def _device(x: torch.Tensor) -> torch.device:
    return torch.device("cpu") if x.is_meta else x.device


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        out = module(x)
    except Exception:  # it may want something else than a tensor of such values: then nothing is known of it
        return None
    return out if isinstance(out, torch.Tensor) and out.is_floating_point() else None
