"""What finding the channel groups and pruning half of the channels costs, beside Torch-Pruning.

Processor seconds with one thread, medians; ours on a graph that was traced before, theirs on the model. *Groups* is
the analysis (theirs: building the dependency graph), *prune* what follows: scoring by the sum of absolute values,
choosing, slicing (theirs: ``step()``). Memory is how far the process grows beyond what it has before (Linux only).

Run ``python benchmarks/pruning_time.py [--repeats 3] [--models REGEX] [--no-peer]``.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import isolated
import publish
import torch
from models import Model, Run, select
from pruning_coverage import ours_on, output_layers, peer_pruner

import fxcompress
from fxcompress.analysis.channels import channel_groups
from fxcompress.editing import private_copy

_MODELS = "^(resnet50|densenet121|vit_b_16|swin_t|maxvit_t)$"
_GOAL = 1 / 3


def measure(model: Model, stage: Callable[[str], None], what: str, repeats: int) -> dict[str, Any]:
    """``what``: ``"ours"``, ``"theirs"``, or ``"forward"`` and ``"analysis"`` for memory."""
    run = model.run()
    args, kwargs = run.inputs(seed=0)
    stage(what)
    graph = fxcompress.trace(run.module, args, example_kwargs=kwargs)
    if what == "theirs":
        return _theirs(run, output_layers(graph, args, kwargs), repeats)
    if what == "ours":
        times = [ours_on(private_copy(graph), args, kwargs) for _ in range(repeats)]
        return {k: statistics.median(t[k] for t in times) for k in times[0]}
    call = (lambda: graph(*args, **kwargs)) if what == "forward" else lambda: channel_groups(graph, args, kwargs)
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back would hide what is asked for
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _memory("VmRSS")
    with torch.no_grad():
        call()
    return {"bytes": _memory("VmHWM") - before}


def _theirs(run: Run, made: Collection[str], repeats: int) -> dict[str, Any]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        _, pruner = peer_pruner(run, made)
        built = time.process_time()
        pruner.step()
        times.append({"groups": built - start, "prune": time.process_time() - built})
    return {k: statistics.median(t[k] for t in times) for k in times[0]}


def _memory(what: str) -> int:
    """Bytes of this process: now (``VmRSS``), or at most since the mark was reset (``VmHWM``)."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(what))
    return int(line.split()[1]) * 1024


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each model."""
    headers = ["model", "groups s", "prune s", "theirs: groups s", "prune s", "ours / theirs"]
    headers += ["forward MB", "analysis MB"]
    rows = []
    for i, ours in enumerate(records["ours"]):
        theirs, forward, analysis = (
            records[k][i] if k in records else {"error": "-"} for k in ("theirs", "forward", "analysis")
        )
        row = [ours["model"], *(_seconds(ours, k) for k in ("groups", "prune"))]
        row += [_seconds(theirs, k) for k in ("groups", "prune")]
        good = "error" not in ours and "error" not in theirs
        row.append(f"{(ours['groups'] + ours['prune']) / (theirs['groups'] + theirs['prune']):.2f}" if good else "")
        row += [f"{r['bytes'] / 1e6:.0f}" if "error" not in r else "" for r in (forward, analysis)]
        rows.append(row)
    return publish.markdown(rows, headers) + "".join(isolated.failures(r) for r in records.values())


def _seconds(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:.2f}" if "error" not in record else "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", default=_MODELS)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = [m for m in select(["tv-classification"]) if re.search(arguments.models, m.name)]
    records = {}
    for what in ("ours", "forward", "analysis") + (() if arguments.no_peer else ("theirs",)):
        records[what] = isolated.collect(
            models, lambda m, s, what=what: measure(m, s, what, arguments.repeats), isolated.Limits(seconds=300)
        )
    publish.publish("pruning_time", table(records), records, write=arguments.models == _MODELS)


if __name__ == "__main__":
    main()
