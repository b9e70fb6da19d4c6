"""Batch norm in training: over the whole batch although every process sees a share of it, or frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SynchronisedNorms", "freeze"]


def freeze(module: nn.Module) -> None:
    """Put every batch norm in ``module`` into evaluation mode."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()


class SynchronisedNorms:
    """Lets batch norms use the statistics of all processes' shares together, on any device and backend.

    What they compute is what one process would compute of the whole batch, gradients included. Layers with a forward
    of their own (subclasses) are left alone.

    Args:
        module: where to look for them.
        world: how many processes there are; nothing is done for one.

    Attributes:
        counts: whether this process has a share of the batch, or one sample to keep it in step, which must not count.
    """

    def __init__(self, module: nn.Module, world: int) -> None:
        self._norms = [
            child for child in module.modules()
            if world > 1 and isinstance(child, _BatchNorm) and type(child).forward is _BatchNorm.forward
        ]  # fmt: skip
        self.counts = True

    def install(self) -> None:
        """From now on they synchronise; only one by one with the other processes may the module be run."""
        for norm in self._norms:
            norm.forward = functools.partial(self._forward, norm)  # type: ignore[method-assign]

    def remove(self) -> None:
        """They are as they were."""
        for norm in self._norms:
            norm.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """As they were while the context lasts, for copies of the module."""
        self.remove()
        try:
            yield
        finally:
            self.install()

    def _forward(self, norm: _BatchNorm, x: Tensor) -> Tensor:
        if not norm.training and norm.running_mean is not None:
            return _BatchNorm.forward(norm, x)
        norm._check_input_dim(x)  # type: ignore[no-untyped-call]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            mean, variance, count = _statistics(x.to(dtype), self.counts)
            if norm.training and norm.running_mean is not None:
                _remember(norm, mean.detach(), variance.detach(), count)
            shape = [1, -1] + [1] * (x.dim() - 2)
            y = (x.to(dtype) - mean.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
            if norm.affine:
                y = y * norm.weight.view(shape) + norm.bias.view(shape)
        return y.to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of one tensor from each process; gradients of the sum are summed in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)  # type: ignore[no-untyped-call]
    return total


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def _statistics(x: Tensor, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes, and how many elements each is of. Two passes, as
    the difference of large sums would lose what the variance is."""
    dims = [d for d in range(x.dim()) if d != 1]
    part = float(counts)
    count = x.new_full((1,), part * x.numel() / x.shape[1])
    sums = _sum(torch.cat([part * x.sum(dims), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    shape = [1, -1] + [1] * (x.dim() - 2)
    squares = _sum(part * (x - mean.view(shape)).square().sum(dims))
    return mean, squares / count, count


def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a plain average
            momentum = 1.0 / float(norm.num_batches_tracked)
    assert momentum is not None
    unbiased = variance * (count / (count - 1).clamp_min(1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
