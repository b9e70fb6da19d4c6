"""Sizes that a graph computes with: where one of them changed, so would the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxcompress.analysis.channels import ChannelGroups, Labelled
from fxcompress.matching import argument, name_of_call

__all__ = ["sizes_as_numbers"]

_SHAPING = frozenset("view reshape expand broadcast_to unflatten".split())
"""What may be given a size that has changed: :class:`Surgery` sees to it."""


def sizes_as_numbers(gm: fx.GraphModule, groups: ChannelGroups) -> Iterator[npt.NDArray[np.int64]]:
    """The classes along every dimension whose size is more than a size to the graph."""
    counts: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if not _is_number(groups.found[node]) or node.op == "placeholder":
            continue
        whole = isinstance(groups.found[node], torch.Size)
        users = [user for user in node.users if not (whole and _picks(user))]  # which speak for themselves
        if any(user in counts or not (_is_number(groups.found[user]) or _shapes(user)) for user in users):
            counts.add(node)
            yield from _asked(node, groups)


def _is_number(value: Any) -> bool:
    """Whether it is a number or a shape, and no tensor."""
    return isinstance(value, (int, float, torch.Size)) and not isinstance(value, bool)


def _shapes(node: fx.Node) -> bool:
    return name_of_call(node) in _SHAPING


def _picks(node: fx.Node) -> bool:
    return name_of_call(node) == "getitem" and isinstance(argument(node, 1, "index"), int)


def _asked(node: fx.Node, groups: ChannelGroups) -> Iterator[npt.NDArray[np.int64]]:
    """The classes along the dimensions whose size ``node`` is, or is made of."""
    for source in node.all_input_nodes:
        x, dim = groups.found[source], None
        if isinstance(x, torch.Size) and source.all_input_nodes:  # x.shape[1]
            x, dim = groups.found[source.all_input_nodes[0]], node.args[1] if _picks(node) else None
        elif name_of_call(node) == "size":
            dim = argument(node, 1, "dim")
        if not isinstance(x, Labelled):
            continue
        for m in x.maps:
            if not isinstance(dim, int) or dim % len(x.shape) in m.dims:
                yield groups.classes_of(m.ids).ravel()
