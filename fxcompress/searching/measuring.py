"""What a graph costs and how far its outputs are from those of the original."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import examples
from fxcompress.analysis.cost import cost
from fxcompress.analysis.latency import affordable_repeats, compare_latency
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.running import GraphRunner
from fxcompress.errors import UsageError
from fxcompress.pass_base import Example

__all__ = ["MEASURES", "Judge", "node_seconds", "sizes_of"]

MEASURES = ("latency", "macs", "params", "bytes")

_SECONDS, _FEWEST, _MOST = 3.0, 9, 60


def sizes_of(gm: fx.GraphModule, example: Example) -> dict[str, float]:
    """Parameters, bytes of parameters and buffers, MACs of one run on the example."""
    found = cost(gm, example.args, example.kwargs)
    return {
        "macs": float(found.macs or 0),
        "params": float(found.parameters),
        "bytes": float(found.bytes),
    }


class Judge:
    """Holds graphs against the original.

    Args:
        origin: the original.
        example: what sizes and times are measured on.
        batches: what outputs are compared on.
        few: the same where little time should be spent.
        evaluate: the caller's measure of quality, if there is one; higher is better.
    """

    def __init__(
        self,
        origin: fx.GraphModule,
        example: Example,
        batches: Sequence[Example],
        few: Sequence[Example],
        evaluate: Callable[[fx.GraphModule], Any] | None,
    ) -> None:
        self._origin, self._example, self._evaluate = origin, example, evaluate
        self._data = {False: batches, True: few}
        self._expected = {key: [_real(examples.evaluate(origin, b)) for b in data] for key, data in self._data.items()}
        if not any(tensors for tensors in self._expected[False]):
            raise UsageError(
                "the model gives no real numbers, so nothing says how far a result is off; give `evaluate`"
            )
        self.sizes = sizes_of(origin, example)
        self._quality: float | None = None

    def error(self, gm: fx.GraphModule, *, few: bool = False) -> float:
        """The distance of all outputs together relative to their norm; infinite if one is not finite."""
        off = norm = 0.0
        for batch, expected in zip(self._data[few], self._expected[few], strict=True):
            got = _real(examples.evaluate(gm, batch))
            for a, b in zip(expected, got, strict=True):
                off += float((a - b).square().sum())
                norm += float(a.square().sum())
        found = math.sqrt(off / norm) if norm else math.sqrt(off)
        return found if math.isfinite(found) else math.inf

    def drop(self, gm: fx.GraphModule, error: float) -> float:
        """What is lost of the quality that ``evaluate`` says; without it, ``error``."""
        if self._evaluate is None:
            return error
        if self._quality is None:
            self._quality = self._quality_of(self._origin)
        return self._quality - self._quality_of(gm)

    def _quality_of(self, gm: fx.GraphModule) -> float:
        assert self._evaluate is not None
        with torch.no_grad():
            value = self._evaluate(gm)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"`evaluate` must give a number, it gave a {type(value).__name__}") from error
        if math.isnan(number):
            raise UsageError("`evaluate` gave NaN, which is neither better nor worse than anything")
        return number

    def cost(self, gm: fx.GraphModule) -> dict[str, float]:
        """What ``gm`` has of each of :data:`MEASURES`, as a fraction of what the original has."""
        own = sizes_of(gm, self._example)
        parts = {m: own[m] / self.sizes[m] if self.sizes[m] else 1.0 for m in own}
        return {"latency": self.latency(gm), **parts}

    def latency(self, gm: fx.GraphModule) -> float:
        """What one call takes, as a fraction of what the original's takes: medians of calls in turns."""
        args, kwargs = self._example.args, self._example.kwargs
        repeats = affordable_repeats(self._origin, args, kwargs, seconds=_SECONDS / 2, fewest=_FEWEST, most=_MOST)
        found = compare_latency({"original": self._origin, "this": gm}, args, kwargs, warmup=3, repeats=repeats)
        return found["this"].median / found["original"].median


def _real(output: Any) -> list[Tensor]:
    return [t.detach().double() for _, t in tensor_leaves(output) if t.is_floating_point()]


class _Timer(GraphRunner):
    """Seconds of each node, over several runs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seconds: dict[str, list[float]] = {node.name: [] for node in gm.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        self.seconds[n.name].append(time.perf_counter() - start)
        return value


def node_seconds(gm: fx.GraphModule, example: Example, runs: int = 7) -> Mapping[str, float]:
    """How long each node takes, by name: the median over ``runs``."""
    timer = _Timer(gm)
    for _ in range(runs):
        timer.observe(example.args, example.kwargs)
    return {name: statistics.median(seconds) for name, seconds in timer.seconds.items()}
