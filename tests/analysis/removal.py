"""Removing channels from a graph, and what that has to equal: the same graph with all their slices set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import ChannelGroups, Labelled, channel_groups
from fxcompress.analysis.running import GraphRunner
from fxcompress.editing import get_attribute, private_copy
from fxcompress.passes.pruning.surgery import Surgery
from tests.networks import Inputs, assert_same_structure, relative_error, run

__all__ = ["check_removal", "drawn", "removed", "zeroed"]


def drawn(groups: ChannelGroups, generator: np.random.Generator, only_exact: bool, least: int = 1) -> np.ndarray:
    """For each class whether it stays: of each group any channels may go, but ``least`` stay. Where something is
    normalised over them two stay, as PyTorch refuses to normalise over a single number."""
    kept = np.ones(groups.classes, dtype=np.bool_)
    for group in groups.groups:
        if group.exact or not only_exact:
            most = group.channels - (least if group.exact else max(least, 2))
            count = int(generator.integers(0, max(most, 0) + 1))
            kept[generator.permutation(group.classes)[:count]] = False
    return kept


def zeroed(gm: fx.GraphModule, groups: ChannelGroups, kept: np.ndarray) -> fx.GraphModule:
    """A copy of ``gm`` in which the slices of parameters (not of buffers) that go are zero."""
    copied = private_copy(gm)
    with torch.no_grad():
        for binding in groups.bindings:
            if isinstance(binding.tensor, nn.Parameter):
                gone = torch.from_numpy(np.flatnonzero(~kept[binding.classes]))
                get_attribute(copied, binding.names[0]).index_fill_(binding.dim, gone, 0.0)
    return copied


def removed(gm: fx.GraphModule, groups: ChannelGroups, kept: np.ndarray) -> None:
    """Take out of ``gm``, to which ``groups`` belong, everything that is not ``kept``."""
    surgery = Surgery(gm, groups, kept)
    for node in list(surgery.nodes()):
        surgery.operate(node)
    gm.graph.lint()
    gm.recompile()


class _Shapes(GraphRunner):
    """Runs a graph and compares the shape of every tensor with the one that was foretold."""

    def __init__(self, gm: fx.GraphModule, groups: ChannelGroups, kept: np.ndarray) -> None:
        super().__init__(gm)
        self.groups, self.kept = groups, kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for found, now in _pairs(self.groups.found.get(n), value):
            foretold = self.groups.sizes(found, self.kept)
            assert tuple(now.shape) == foretold, f"{n.format_node()}: {tuple(now.shape)}, foretold {foretold}"
        return value


def _pairs(found: Any, value: Any) -> Iterator[tuple[Labelled, torch.Tensor]]:
    if isinstance(found, Labelled) and isinstance(value, torch.Tensor):
        yield found, value
    elif isinstance(found, tuple | list) and isinstance(value, tuple | list):
        for f, v in zip(found, value, strict=True):
            yield from _pairs(f, v)


def check_removal(
    gm: fx.GraphModule,
    inputs: Inputs,
    others: Sequence[Inputs],
    *,
    attention: str,
    seed: int,
    only_exact: bool,
    tolerance: float = 1e-10,
) -> int:
    """Remove channels drawn from ``seed`` from a copy of ``gm``.

    The result runs, on ``others`` as well, gives outputs of the same structure, and every tensor in it has the shape
    that was foretold. With ``only_exact`` it equals :func:`zeroed`.

    Returns:
        How many classes have gone.
    """
    copied = private_copy(gm)
    groups = channel_groups(copied, *inputs, attention=attention)
    kept = drawn(groups, np.random.default_rng(seed), only_exact)
    reference = zeroed(gm, groups, kept)
    removed(copied, groups, kept)
    _Shapes(copied, groups, kept).observe(*inputs)
    for given in (inputs, *others):
        expected, found = run(reference, given), run(copied, given)
        assert_same_structure(expected, found)
        if only_exact:
            error = relative_error(expected, found)
            assert error <= tolerance, f"off by {error:.1e} without {int((~kept).sum())} classes of\n{groups}"
    return int((~kept).sum())
