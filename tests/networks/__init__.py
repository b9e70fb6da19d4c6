"""Small networks made of blocks, for the strategies in ``tests.strategies`` and the sweep over single blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.networks.base import (
    KINDS,
    MAPS,
    Block,
    Inputs,
    Network,
    Signal,
    Stack,
    assert_same_structure,
    build,
    fill,
    leaves,
    relative_error,
    run,
    settle,
    unresponsive_inputs,
)
from tests.networks.composites import COMPOSITES, Split
from tests.networks.inplace import InPlace
from tests.networks.maps import MAP_BLOCKS
from tests.networks.plumbing import PLUMBING_BLOCKS
from tests.networks.shells import OUTPUTS, SHELLS, Shell, SingleInput, assemble
from tests.networks.tokens import TOKEN_BLOCKS

__all__ = [
    "BLOCKS",
    "COMPOSITES",
    "KINDS",
    "MAPS",
    "OUTPUTS",
    "SHELLS",
    "SIGNALS",
    "Block",
    "Inputs",
    "Network",
    "Shell",
    "Signal",
    "SingleInput",
    "Split",
    "Stack",
    "assemble",
    "assert_same_structure",
    "build",
    "fill",
    "leaves",
    "relative_error",
    "run",
    "settle",
    "single_blocks",
    "unresponsive_inputs",
]

BLOCKS: tuple[type[Block], ...] = MAP_BLOCKS + TOKEN_BLOCKS + PLUMBING_BLOCKS + (InPlace,)

SIGNALS = {
    "2d": Signal("2d", 4, (6, 5)),
    "vector": Signal("vector", 4),
    "sequence": Signal("sequence", 4, (5,)),
    "1d": Signal("1d", 4, (7,)),
    "3d": Signal("3d", 4, (3, 4, 3)),
}
# Blocks that make maps grow, or halve them, want other sizes than the usual.
_OTHER_SIZES = (Signal("2d", 4, (4, 4)), Signal("1d", 4, (4,)), Signal("3d", 4, (5, 5, 5)), Signal("3d", 4, (4, 4, 4)))


def _signals_for(block: type[Block]) -> list[Signal]:
    found = {}
    for signal in (*SIGNALS.values(), *_OTHER_SIZES):
        if block.accepts(signal):
            found.setdefault(signal.kind, signal)
    return list(found.values())


def _variations(block: type[Block]) -> Iterator[dict[str, Any]]:
    """The simplest options, and all others one at a time."""
    simplest = {name: values[0] for name, values in block.OPTIONS.items()}
    yield simplest
    for name, values in block.OPTIONS.items():
        for value in values[1:]:
            yield simplest | {name: value}


def _single(block: type[Block], signal: Signal, options: dict[str, Any]) -> Network:
    empty = Stack(signal, [])
    inner = block.inner(signal) if issubclass(block, Split) else signal
    if block in COMPOSITES:
        options = options | {"body": Stack(inner, [_default(inner)])}
    body = build(block, signal, **options)
    network = assemble(SingleInput, signal, empty, Stack(signal, [body]), "tensor", 2, torch.float32)
    settle(network, seed=0)
    return network


def _default(signal: Signal) -> Block:
    cls = next(block for block in BLOCKS if block.accepts(signal) and block.KEEPS)
    return build(cls, signal, **{name: values[0] for name, values in cls.OPTIONS.items()})


def single_blocks(every_kind: bool = True) -> dict[str, Callable[[], Network]]:
    """One network per block, option value and kind of signal: what random drawing meets only sooner or later.

    Args:
        every_kind: whether to build it for every kind of signal that the block reads, or for the first of them.
    """
    networks = {}
    for block in (*BLOCKS, *COMPOSITES):
        for signal in _signals_for(block)[: None if every_kind else 1]:
            for options in _variations(block):
                shown = ",".join(f"{k}={v}" for k, v in options.items())
                name = f"{block.__name__}({shown}) {signal.kind}"
                networks[name] = lambda b=block, s=signal, o=options: _single(b, s, o)
    return networks
