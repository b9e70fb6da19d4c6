"""Lists of passes with a name, for who does not want to choose; ``benchmarks/presets.py`` is how they were chosen."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PRESETS", "presets"]

_START = ("remove-identity", "fold-batch-norm")

PRESETS: Mapping[str, tuple[str, ...]] = {
    "fast-cpu": (*_START, "quantize", "lower-int8"),
    "small": (*_START, "alds:ratio=0.2,error=activation", "quantize", "lower-int8"),
    "accurate": (*_START, "quantize:observer=min-max,rounding=adaptive", "lower-int8"),
}


def presets() -> dict[str, list[str]]:
    """The presets by name, each as the list of passes that it stands for."""
    return {name: list(passes) for name, passes in PRESETS.items()}
