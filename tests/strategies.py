"""Hypothesis strategies that draw whole networks: a stack of blocks inside a shell of inputs and outputs.

Everything is drawn from small finite choices whose first value is the simplest, so a failing network shrinks to few
blocks with plain options, and its repr reads as the recipe. Parameters follow from one drawn seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.networks import (
    BLOCKS,
    COMPOSITES,
    KINDS,
    OUTPUTS,
    SHELLS,
    Block,
    Network,
    Shell,
    Signal,
    Split,
    Stack,
    assemble,
    build,
    settle,
)

__all__ = ["blocks", "networks", "signals", "stacks"]

SIZES = {
    "2d": ((6, 6), (5, 6), (4, 4), (3, 5)),
    "vector": ((),),
    "sequence": ((5,), (4,)),
    "1d": ((6,), (8,), (4,)),
    "3d": ((3, 3, 3), (2, 4, 3), (4, 4, 4)),
}


@st.composite
def signals(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Signal:
    """The signal that a network reads."""
    kind = draw(st.sampled_from(kinds))
    return Signal(kind, draw(st.sampled_from((4, 8, 6))), draw(st.sampled_from(SIZES[kind])))


@st.composite
def blocks(draw: st.DrawFn, signal: Signal, among: Sequence[type[Block]], depth: int, keeps: bool) -> Block:
    """One block that reads ``signal``; with ``keeps``, one that leaves kind and sizes as they are."""
    composites = COMPOSITES if depth else ()
    allowed = [b for b in (*among, *composites) if b.accepts(signal) and (b.KEEPS or not keeps)]
    block = draw(st.sampled_from(allowed))
    options: dict[str, Any] = {name: draw(st.sampled_from(values)) for name, values in block.OPTIONS.items()}
    if block in COMPOSITES:
        inner = block.inner(signal) if issubclass(block, Split) else signal
        options["body"] = draw(stacks(inner, among, most=2, depth=depth - 1, keeps=True))
    return build(block, signal, **options)


@st.composite
def stacks(
    draw: st.DrawFn, signal: Signal, among: Sequence[type[Block]], most: int, depth: int, keeps: bool = False
) -> Stack:
    """At most ``most`` blocks, each reading what the one before it emits."""
    drawn: list[Block] = []
    current = signal
    for _ in range(draw(st.integers(0, most))):
        drawn.append(draw(blocks(current, among, depth, keeps)))
        current = drawn[-1].out
    return Stack(signal, drawn)


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = KINDS,
    among: Sequence[type[Block]] = BLOCKS,
    shells: Sequence[type[Shell]] = SHELLS,
    outputs: Sequence[str] = tuple(OUTPUTS),
    most: int = 5,
    depth: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network whose every input reaches an output.

    Args:
        draw: hypothesis's own.
        kinds: the kinds of signal it may read.
        among: the blocks it is made of, besides residuals, concatenations and splits.
        shells: how its inputs may come in.
        outputs: the names of the containers of its outputs.
        most: how many blocks at the top level, at most.
        depth: how deep blocks may nest; 0 leaves out the composite ones.
        dtype: of parameters and inputs.
    """
    signal = draw(signals(kinds))
    shell = draw(st.sampled_from([s for s in shells if signal.kind in s.KINDS]))
    first = draw(stacks(signal, among, most, depth))
    second = draw(stacks(first.out, among, most - len(first.blocks), depth))
    container = draw(st.sampled_from(outputs))
    batch = draw(st.sampled_from((2, 3, 1)))
    network = assemble(shell, signal, first, second, container, batch, dtype)
    seed = draw(st.integers(0, 999))
    # Some recipes forget their input whatever the parameters: an instance norm under a mean, for one.
    assume(settle(network, seed))
    network.description += f", seed={seed}"
    return network
