"""Tables on the screen and in benchmarks/results/: NAME.md for the README, NAME.json with every record behind it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxcompress.report import plain

__all__ = ["environment", "markdown", "publish"]

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in ("torch", "torchvision", "timm", "transformers", "torchao", "openvino", "nncf", "onnx", "onnxruntime"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        **versions,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[1],
    }


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table that both a terminal and GitHub can show: the first column to the left, the others to the right."""
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)


def publish(name: str, text: str, data: Any, *, write: bool = True) -> None:
    """Print ``text``; with ``write``, put it into NAME.md, and ``data``, if any, with the environment into
    NAME.json."""
    print(text)
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    if data is None:
        return
    whole = json.dumps(plain({"environment": environment(), "results": data}), indent=1, allow_nan=False)
    (RESULTS / f"{name}.json").write_text(whole + "\n", encoding="utf-8")
