"""Saving and loading 100 million parameters: seconds and peak memory beside plain safetensors and torch.save.

Each measurement has a process of its own; ways take turns. Saving is of a graph in memory; loading goes on until
every weight has been read once, as a first run would, since mapping alone reads nothing. Peak memory is what the
process holds at most, over what it held before, relative to the weights; pages mapped from a file count. The goals:
within twice the time of plain safetensors, at most 1.2 times the weights in memory.

Run ``python benchmarks/save_load.py [--repeats 5] [--layers 100]``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import publish
import safetensors.torch
import torch
from torch import nn

import fxcompress

_WIDTH = 1000
_WAYS = ("fxcompress", "fxcompress, unchecked", "safetensors", "torch.save")


def _peak(field: str) -> int:
    """Of this process, in bytes: ``VmHWM`` the highest so far, ``VmRSS`` now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _measured(call: Callable[[], Any]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, start = _peak("VmRSS"), time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "bytes": _peak("VmHWM") - before}


def _graph(layers: int) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return fxcompress.trace(nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(layers)]), torch.randn(1, _WIDTH))


def _read(tensors: Any) -> None:
    for tensor in tensors:
        tensor.view(torch.uint8).view(-1)[::1024].sum()


def _save(way: str, folder: Path, layers: int) -> dict[str, float]:
    gm = _graph(layers)
    calls: dict[str, Callable[[], Any]] = {
        "fxcompress": lambda: fxcompress.save(gm, folder / "saved"),
        "safetensors": lambda: safetensors.torch.save_file(gm.state_dict(), folder / "plain.safetensors"),
        "torch.save": lambda: torch.save(gm.state_dict(), folder / "plain.pt"),
    }
    return _measured(calls[way])


def _load(way: str, folder: Path, layers: int) -> dict[str, float]:
    calls: dict[str, Callable[[], Any]] = {
        "fxcompress": lambda: _read(fxcompress.load(folder / "saved").parameters()),
        "fxcompress, unchecked": lambda: _read(fxcompress.load(folder / "saved", check=False).parameters()),
        "safetensors": lambda: _read(safetensors.torch.load_file(folder / "plain.safetensors").values()),
        "torch.save": lambda: _read(torch.load(folder / "plain.pt").values()),
    }
    return _measured(calls[way])


def _in_a_process(what: str, way: str, folder: str, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", what, way, folder, "--layers", str(layers)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Measure, print and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="do not write results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        what, way, folder = arguments.one
        print(json.dumps({"save": _save, "load": _load}[what](way, Path(folder), arguments.layers)))
        return
    records: dict[str, dict[str, list[dict[str, float]]]] = {"save": {}, "load": {}}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for what in ("save", "load"):
                for way in _WAYS:
                    if (what, way) != ("save", "fxcompress, unchecked"):
                        found = _in_a_process(what, way, folder, arguments.layers)
                        records[what].setdefault(way, []).append(found)
                os.sync()
    weights = arguments.layers * _WIDTH * (_WIDTH + 1) * 4
    rows = []
    for what, ways in records.items():
        plain = statistics.median(r["seconds"] for r in ways["safetensors"])
        for way, found in ways.items():
            seconds = statistics.median(r["seconds"] for r in found)
            memory = statistics.median(r["bytes"] for r in found) / weights
            total = memory + (what == "save")  # the weights that are saved are there already
            rows.append([f"{what}: {way}", f"{seconds:.2f} s", f"{seconds / plain:.2f}", f"{total:.2f}"])
    table = publish.markdown(
        rows, [f"{weights / 4e6:.0f} M parameters", "median", "of safetensors' time", "peak memory"]
    )
    note = "peak memory: in units of the weights, which are in it; pages mapped from a file count as memory"
    publish.publish("save_load", f"{table}\n\n{note}", records, write=not arguments.dry)


if __name__ == "__main__":
    main()
