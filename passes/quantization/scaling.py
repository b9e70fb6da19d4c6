"""From scales of classes to sites, one for each stream, and what is done there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.analysis.channels.atoms import Ids
from fxcompress.pass_base import Refusal, Site
from fxcompress.passes.quantization.balancing import Reals
from fxcompress.passes.quantization.streams import Part, Streams

__all__ = ["rescale", "stream_sites"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rescaling:
    """Parts, each with what its rows are divided by and its columns multiplied by."""

    gm: fx.GraphModule
    parts: tuple[tuple[Part, Tensor, Tensor], ...]


def stream_sites(gm: fx.GraphModule, streams: Streams, exponents: Reals) -> Iterator[Site | Refusal]:
    """A site for each stream some of which is scaled, in graph order, and what was refused.

    Args:
        gm: the graph.
        streams: all streams.
        exponents: for each class the logarithm of its scale to base 2.
    """
    seen: set[int] = set()
    for part in streams.parts:
        for number in dict.fromkeys(int(n) for n in streams.stream[part.rows]):
            inside = (streams.stream == number) & (np.arange(streams.count) > 0)
            if number not in seen and exponents[inside].any():
                yield _site(gm, streams, number, np.where(inside, exponents, 0.0))
            seen.add(number)
    yield from streams.refusals


def _site(gm: fx.GraphModule, streams: Streams, number: int, exponents: Reals) -> Site | Refusal:
    members = streams.members(number)

    def factors(ids: Ids) -> Tensor:
        return torch.from_numpy(np.exp2(exponents[ids]))

    def touches(ids: Ids) -> bool:
        return bool((streams.stream[ids] == number).any())

    own = exponents[streams.stream == number]
    detail: dict[str, Any] = {
        "writers": [part.path for part in members if touches(part.rows)],
        "readers": [part.path for part in members if touches(part.columns)],
        "channels": len(own),
        "scaled": int((own != 0).sum()),
        "least": float(np.exp2(own.min())),
        "greatest": float(np.exp2(own.max())),
    }
    first = next(part for part in members if touches(part.rows))
    scaled = tuple((part, factors(part.rows), factors(part.columns)) for part in members)
    if wide := [part.path for part, *by in scaled if part.overflows(*by)]:
        return Refusal(first.node, f"scaled, parameters would overflow their dtype: {', '.join(wide)}")
    return Site(first.node, _Rescaling(gm, scaled), detail)


def rescale(site: Site) -> None:
    """Scale what writes and reads the stream of ``site``; parameters are new ones, the old tensors stay as they are."""
    for part, rows, columns in site.data.parts:
        part.scale(site.data.gm, rows, columns)
