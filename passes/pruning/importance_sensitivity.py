"""How much of what a layer gives comes from one of the channels that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxcompress.analysis.channels import ChannelGroups, Group
from fxcompress.calibration import collect
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import tensor_input
from fxcompress.pass_base import Observation, PassContext
from fxcompress.passes.pruning.scoring import Importance, Scorer

__all__ = ["ProvableSensitivity"]

_AT_ONCE = 2**22
"""How many products are held at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProvableSensitivity(Importance):
    """PFP: the largest share that a channel has in any output of the layers that read it (Liebenwein et al. 2020,
    Provable Filter Pruning, arXiv 1911.07412)::

        s_j = max over samples and outputs i of  |w_ij a_j| / sum over k of |w_ik a_k|

    ``w_ij a_j`` is all that output i gets from channel j: for a convolution the sum over the kernel at one place, for a
    channel with several places in a linear layer (after a flatten) the sum over these. In a transposed convolution each
    tap of the kernel counts as an output. The bias is left out, and a share in nothing but zeros is 0. Of all layers
    that read the channel the largest share counts.

    Scores are in [0, 1] and compare as they are. The graph runs in the mode (training or evaluation) that it is in.
    Where convolutions lose whole groups (depthwise ones) an output sees one channel, which says nothing; the layers
    behind them are in the same channel group and count. A channel group that nothing else reads is refused.

    Args:
        places: how many samples are taken of each batch for each layer: drawn, without repetition, among all images and
            places of a convolution's output (of its input if it is transposed), or all rows that a linear layer reads.
        seed: of these draws.
    """

    name: ClassVar[str] = "pfp"
    needs_data: ClassVar[bool] = True
    places: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.places < 1:
            raise UsageError(f"places is at least 1, got {self.places}")

    def prepare(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """See :meth:`Importance.prepare`. The scorer raises PreconditionError for a group that no such layer reads."""
        assert context.batches is not None, "asked for in requires()"
        found = collect(context.gm, context.batches, list(self._wishes(context, groups)))
        largest = torch.full((groups.classes,), -1.0, dtype=torch.float64)
        for classes, shares in found.values():
            largest[classes] = torch.maximum(largest[classes], shares)

        def score(group: Group) -> Tensor:
            scores = largest[torch.from_numpy(group.classes)]
            if bool((scores < 0).any()):
                raise PreconditionError(
                    f"importance {self.name!r} goes by what reads a channel, and no linear layer or convolution reads "
                    f"group {group.name!r} (made by {', '.join(group.producers)}). Exclude these layers, or take "
                    "another importance"
                )
            return scores

        return score

    def _wishes(self, context: PassContext, groups: ChannelGroups) -> Iterator[Observation]:
        wanted = np.zeros(groups.classes, dtype=np.bool_)
        for group in groups.groups:
            wanted[group.classes] = True
        classes = {(id(b.tensor), b.dim): b.classes for b in groups.bindings}
        for node in context.gm.graph.nodes:
            module, source = context.module(node), tensor_input(node)
            if isinstance(module, (nn.Linear, _ConvNd)) and isinstance(source, fx.Node):
                read = classes.get((id(module.weight), 0 if _is_transposed(module) else 1))
                if read is not None and wanted[read].any() and (row := _first_group(module, read)) is not None:
                    shares = partial(_Shares, module, row, self.places, self.seed)
                    yield Observation(source, f"{self.name} {node.name}", shares)


def _is_transposed(module: nn.Linear | _ConvNd) -> bool:
    return isinstance(module, _ConvNd) and module.transposed


def _groups(module: nn.Linear | _ConvNd) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def _first_group(module: nn.Linear | _ConvNd, read: np.ndarray) -> np.ndarray | None:
    """The classes that each group of a convolution reads, or ``None`` if not every group reads the same."""
    if not _is_transposed(module):
        return read
    rows = read.reshape(_groups(module), -1)
    return rows[0] if bool((rows == rows[0]).all()) else None


class _Shares:
    """The largest share of each class in any output of ``module``, over a stream of its inputs.

    Args:
        module: a linear layer or a convolution.
        read: the class of each of the channels that one of its groups reads.
        places, seed: see :class:`ProvableSensitivity`.
    """

    def __init__(self, module: nn.Linear | _ConvNd, read: np.ndarray, places: int, seed: int) -> None:
        self._module, self._places = module, places
        self._generator = torch.Generator().manual_seed(seed)
        self._classes, inverse, counts = np.unique(read, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        # Classes with equally many channels are worked out together: which they are, and where their channels are.
        self._blocks = [
            (
                torch.from_numpy(np.flatnonzero(counts == n)),
                torch.from_numpy(order[counts[inverse[order]] == n].reshape(-1, n)),
            )
            for n in np.unique(counts)
        ]
        self._largest = torch.zeros(len(self._classes), dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """Take in one input of the layer."""
        weight = _as_grouped(self._module)  # (groups, out, in, taps)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        samples = _samples(self._module, value, self._pick).to(dtype)  # (samples, groups, in, taps)
        step = max(1, _AT_ONCE // (weight.shape[0] * weight.shape[1] * len(self._classes)))
        weights = [_of_classes(weight.to(dtype), where) for _, where in self._blocks]
        for part in torch.split(samples, step):
            # Each (groups, classes, samples, out).
            products = [
                torch.einsum("sgum,goum->guso", _of_classes(part, where), w).abs_()
                for (_, where), w in zip(self._blocks, weights, strict=True)
            ]
            total = torch.stack([p.sum(1) for p in products]).sum(0).clamp_min_(torch.finfo(dtype).tiny)
            for (classes, _), p in zip(self._blocks, products, strict=True):
                shares = p.div_(total[:, None]).amax((0, 2, 3)).cpu().double()
                self._largest[classes] = torch.maximum(self._largest[classes], shares)

    def merge(self, other: _Shares) -> None:
        """Take in what ``other`` saw."""
        self._largest = torch.maximum(self._largest, other._largest)

    def result(self) -> tuple[Tensor, Tensor]:
        """Classes, and the largest share of each; both of shape ``(classes,)``."""
        return torch.from_numpy(self._classes), self._largest

    def _pick(self, total: int) -> Tensor:
        """Which of ``total`` samples to look at, in order."""
        if total <= self._places:
            return torch.arange(total)
        return torch.randperm(total, generator=self._generator)[: self._places].sort().values


def _of_classes(values: Tensor, where: Tensor) -> Tensor:
    """(a, b, in, taps) as (a, b, classes, all that a class has); ``where`` are the channels of each class."""
    return values[:, :, where.to(values.device)].flatten(3)


def _as_grouped(module: nn.Linear | _ConvNd) -> Tensor:
    """The weight, as (groups, out / groups, in / groups, taps); with the taps among the outputs if it is transposed."""
    weight, groups = module.weight.detach(), _groups(module)
    if not _is_transposed(module):
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    taps = weight.reshape(groups, weight.shape[0] // groups, -1)  # (groups, in / groups, out / groups * taps)
    return taps.transpose(1, 2)[..., None]


def _samples(module: nn.Linear | _ConvNd, x: Tensor, pick: Callable[[int], Tensor]) -> Tensor:
    """What outputs of ``module`` see of its input ``x``, of shape (samples, groups, in / groups, taps)."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[pick(len(rows)).to(x.device)][:, None, :, None]
    x = x if x.dim() == module.weight.dim() else x[None]
    last = x.movedim(1, -1)
    if module.transposed:
        rows = last.reshape(-1, last.shape[-1])
        return rows[pick(len(rows)).to(x.device)].reshape(-1, module.groups, x.shape[1] // module.groups, 1)
    return _patches(module, x, pick)


def _patches(conv: _ConvNd, x: Tensor, pick: Callable[[int], Tensor]) -> Tensor:
    """Patches of ``x``, of shape (images, in, ...), that ``conv`` sees, as (samples, groups, in / groups, taps)."""
    padded = F.pad(
        x, conv._reversed_padding_repeated_twice, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    picked = pick(len(x) * int(np.prod(sizes)))
    image, *places = torch.unravel_index(picked.to(x.device), (len(x), *sizes))
    rank = len(kernel)
    index = [image.reshape(-1, *[1] * rank)]
    for i, place in enumerate(places):
        taps = torch.arange(kernel[i], device=x.device) * dilation[i]
        seen = place[:, None] * stride[i] + taps
        index.append(seen.reshape(-1, *[kernel[i] if d == i else 1 for d in range(rank)]))
    patches = padded.movedim(1, -1)[tuple(index)]  # (samples, *kernel, in)
    return patches.movedim(-1, 1).reshape(len(picked), conv.groups, x.shape[1] // conv.groups, -1)
