"""Which of the teacher's channels a pruned student kept, from the record of its pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxcompress import matching
from fxcompress.analysis.shapes import Shapes, TensorSpec
from fxcompress.report import PassRecord

__all__ = ["kept_channels"]


def kept_channels(node: fx.Node, known: Shapes, history: Sequence[PassRecord], teacher: int) -> list[int] | None:
    """For each channel of ``node`` its index before anything was pruned; ``None`` if the record does not tell.

    The record says it of layers; what follows a layer and leaves its channels as they are has the same.

    Args:
        node: gives ``(N, C, ...)``, or ``(N, T, C)``.
        known: the shapes of the graph.
        history: what passes did.
        teacher: how many channels there are in the teacher.
    """
    wanted = _width(node, known)
    source: fx.Node | None = node
    while source is not None and wanted is not None and _width(source, known) == wanted:
        if source.op == "call_module":
            found = _composed(str(source.target), history, teacher)
            if found is not None and len(found) == wanted:
                return found
        source = matching.tensor_input(source)
    return None


def _width(node: fx.Node, known: Shapes) -> int | None:
    spec = known[node]
    if not isinstance(spec, TensorSpec) or len(spec.shape) < 2:
        return None
    return spec.shape[-1 if len(spec.shape) == 3 else 1]


def _composed(path: str, history: Sequence[PassRecord], before: int) -> list[int] | None:
    """What is left of ``before`` channels after all records of the layer at ``path``."""
    left, seen = list(range(before)), False
    for record in history:
        for detail in (d for d in record.details if d.get("target") == path and "kept" in d):
            kept = _numbers(str(detail["kept"]))
            if kept[-1] >= len(left):
                return None
            left, seen = [left[i] for i in kept], True
    return left if seen else None


def _numbers(text: str) -> list[int]:
    """Of ``"0-3,6"``."""
    parts = [part.split("-") for part in text.split(",")]
    return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]
