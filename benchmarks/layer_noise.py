"""The signal-to-noise ratio of what each layer of a quantised graph gives, with all that was quantised before it."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import publish
import torch
from torch import Tensor, fx

__all__ = ["decibels", "layer_path", "signal_to_noise"]


class _Watch(fx.Interpreter):
    """Runs a graph and tells ``seen`` of each layer of integer weights, or module, by path and number of the call."""

    def __init__(self, gm: fx.GraphModule, seen: Callable[[tuple[str, int], Tensor], None]) -> None:
        super().__init__(gm)
        self._seen = seen
        self._calls: collections.Counter[str] = collections.Counter()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        path = str(n.target) if n.op == "call_module" else layer_path(n)
        if path is not None and isinstance(result, Tensor):
            self._calls[path] += 1
            self._seen((path, self._calls[path]), result)
        return result


@torch.no_grad()
def signal_to_noise(folded: fx.GraphModule, reference: fx.GraphModule, *inputs: Any) -> str:
    """A table with a row for each layer: its path, the shape of what it gives, decibels.

    Args:
        folded: the graph before ``quantize``.
        reference: the graph that it made.
        inputs: what both are run on.
    """
    wanted = {path for node in reference.graph.nodes if (path := layer_path(node)) is not None}
    expected: dict[tuple[str, int], Tensor] = {}
    rows: list[list[str]] = []

    def remember(key: tuple[str, int], result: Tensor) -> None:
        if key[0] in wanted:
            expected[key] = result.clone()

    def compare(key: tuple[str, int], result: Tensor) -> None:
        if key[0] in wanted:
            y = expected.pop(key)
            rows.append([key[0], str(tuple(y.shape)), f"{decibels(y, result):.1f}"])

    _Watch(folded, remember).run(*inputs)
    _Watch(reference, compare).run(*inputs)
    return publish.markdown(rows, ["layer", "gives", "SNR dB"])


def layer_path(node: fx.Node) -> str | None:
    """Of a layer in a reference graph: a function of a weight that is dequantised."""
    if node.op != "call_function" or len(node.args) < 3:
        return None
    weight = node.args[1]
    while isinstance(weight, fx.Node) and weight.op == "call_function":  # a reshape of groups, the dequantisation
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not str(weight.target).endswith(".weight"):
        return None
    return str(weight.target).removesuffix(".weight")


def decibels(expected: Tensor, found: Tensor) -> float:
    """Of the energy of ``expected`` over that of the difference."""
    noise = float((found.double() - expected.double()).square().sum())
    return math.inf if not noise else 10 * math.log10(float(expected.double().square().sum()) / noise)
