"""What a layer reads to give its output at one place: the patch under a kernel, the row of a linear layer."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PLACES", "READABLE", "Readable", "output_places", "padded", "places_under", "rows_at", "some_places"]

Readable: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
READABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLACES = 64
"""Of each sample statistics look at as many places of the output."""


def padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """``x`` with the border that ``layer`` puts around it."""
    padding: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            both = layer.dilation[i] * (layer.kernel_size[i] - 1)
            padding += [both // 2, both - both // 2]
        elif not isinstance(layer.padding, str):
            padding += [layer.padding[i]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, padding, mode) if any(padding) else x


def places_under(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, sizes: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The sizes in space of what ``layer`` gives, from those of its input with the border."""
    steps = zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return tuple((size - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, dilation in steps)


def output_places(layer: Readable, x: Tensor) -> tuple[int, ...]:
    """The sizes of the output on ``x``, which has samples in the first dimension, without samples and channels."""
    return tuple(x.shape[1:-1]) if isinstance(layer, nn.Linear) else places_under(layer, padded(layer, x).shape[2:])


def some_places(samples: int, places: int, generator: torch.Generator) -> Tensor:
    """For each sample numbers of places, ``(samples, at most PLACES)``: all ``places``, or some that are drawn."""
    if places > PLACES:
        return torch.randint(places, (samples, PLACES), generator=generator)
    return torch.arange(places).expand(samples, places)


def rows_at(layer: Readable, x: Tensor, chosen: Tensor) -> Tensor:
    """What is read at some places.

    Args:
        layer: the layer.
        x: its input, with samples in the first dimension.
        chosen: for each sample numbers of places in the output, ``(samples, places)``.

    Returns:
        ``(samples * places, groups, inputs of a group * kernel)``.
    """
    samples = torch.arange(len(x), device=chosen.device)[:, None]
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[samples, chosen].flatten(0, 1)[:, None]
    with_border = padded(layer, x)
    corner = torch.unravel_index(chosen, places_under(layer, with_border.shape[2:]))
    index = torch.zeros_like(chosen)[..., None]  # of each element of a patch in the flattened input
    for i, (k, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        along = corner[i][..., None] * stride + torch.arange(k, device=chosen.device) * dilation
        index = (index[..., None] * with_border.shape[2 + i] + along[..., None, :]).flatten(2)
    patches = with_border.flatten(2).transpose(1, 2)[samples[..., None], index]  # (samples, places, kernel, channels)
    patches = patches.flatten(0, 1).transpose(1, 2)
    return patches.reshape(len(patches), layer.groups, math.prod(patches.shape[1:]) // layer.groups)
