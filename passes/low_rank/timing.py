"""How long a layer and the pairs that could stand for it take on this machine.

All candidates of a layer are timed in turns, on random input of the shapes that the layer has in the graph, with the
number of threads that PyTorch is set to. Layers alike are timed once in a process.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.analysis.latency import compare_latency
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.layers import Layer
from fxcompress.passes.low_rank.folding import Choice, Folding
from fxcompress.passes.low_rank.tables import Table

__all__ = ["seconds_of", "worth_timing"]

_RANKS, _MOST_SLICES = 8, 4
_MULTIPLE = 8
_REPEATS, _WARMUP = 9, 2

_known: dict[Hashable, np.ndarray] = {}


def worth_timing(table: Table) -> np.ndarray:
    """The options to time: the layer itself and, for each scheme and small number of slices, a few ranks that are
    multiples of 8 (or few channels), evenly spread over those that pay."""
    keep = [np.zeros(1, dtype=np.int64)]
    for scheme in np.unique(table.scheme[1:]):
        for slices in np.unique(table.slices[1:]):
            inside = np.flatnonzero((table.scheme == scheme) & (table.slices == slices) & (table.rank > 0))
            if slices > _MOST_SLICES or not len(inside):
                continue
            fine = inside[(table.rank[inside] * slices) % _MULTIPLE == 0]
            inside = fine if len(fine) else inside
            keep.append(inside[np.unique(np.linspace(0, len(inside) - 1, _RANKS).round().astype(np.int64))])
    return np.concatenate(keep)


def seconds_of(layer: Layer, choices: Sequence[Choice | None], specs: Sequence[TensorSpec]) -> np.ndarray:
    """Median seconds of each of ``choices`` (``None`` is the layer as it is), over all calls of the layer.

    Args:
        layer: the layer.
        choices: what could become of it.
        specs: shape and dtype of its input in each call.
    """
    total = np.zeros(len(choices))
    for spec in specs:
        key = (_kind(layer), tuple(choices), spec, torch.get_num_threads())
        if key not in _known:
            _known[key] = _timed(layer, choices, spec)
        total += _known[key]
    return total


def _kind(layer: Layer) -> Hashable:
    """What the time depends on, of the layer."""
    names = ("stride", "padding", "dilation", "padding_mode", "output_padding")
    options = tuple(getattr(layer, n, None) for n in names)
    w = layer.weight
    return type(layer), Folding.of(layer), options, layer.bias is not None, w.dtype, w.stride(), str(w.device)


def _timed(layer: Layer, choices: Sequence[Choice | None], spec: TensorSpec) -> np.ndarray:
    folding = Folding.of(layer)
    generator = torch.Generator().manual_seed(0)
    x: Any = torch.randn(spec.shape, generator=generator).to(spec.device, spec.dtype)
    if x.dim() == 4 and layer.weight.dim() == 4 and not layer.weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    candidates: dict[str, nn.Module] = {}
    for i, choice in enumerate(choices):
        if choice is None:
            candidates[str(i)] = copy.deepcopy(layer).eval()
        else:
            left, right = _random_factors(folding, choice, generator)
            candidates[str(i)] = nn.Sequential(*folding.pair(layer, choice.scheme, left, right, layer.bias)).eval()
    times = compare_latency(candidates, (x,), warmup=_WARMUP, repeats=_REPEATS)
    return np.array([times[str(i)].median for i in range(len(choices))])


def _random_factors(folding: Folding, c: Choice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, columns = folding.shape(c.scheme, c.slices)
    count = folding.groups * c.slices
    sizes = ((count, rows, c.rank), (count, c.rank, columns))
    left, right = (torch.randn(size, generator=generator) for size in sizes)
    return left, right
