"""Whether a model with half of its MACs is twice as fast: latency before and after channel pruning.

``PruneChannels(ratio=0.5, measure="macs", round_to=8)`` on random weights (which channels go does not matter for time),
one image of 224 x 224, eager and under ``torch.compile``; all four are timed in turns. Medians +- interquartile range.

Run ``python benchmarks/pruning_latency.py [--models resnet50,mobilenet_v2] [--repeats 30] [--threads 1]``.
"""

from __future__ import annotations

import argparse
from typing import Any

import publish
import torch
from models import select

import fxcompress
from fxcompress.analysis.latency import compare_latency
from fxcompress.passes.pruning import PruneChannels

_MODELS = "resnet50,mobilenet_v2"


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Latencies in seconds, and what is left of parameters and MACs."""
    run = next(m for m in select(["tv-classification"], f"^{name}$")).run()
    args, _ = run.inputs(seed=0)
    folded = fxcompress.compile(run.module, ["remove-identity", "fold-batch-norm"], args)
    pruned = fxcompress.compile(folded, [PruneChannels(ratio=0.5, measure="macs", round_to=8)], args)
    total = fxcompress.report(pruned).passes[-1]
    models = {"before": folded, "after": pruned}
    compiled = {f"{k}, compiled": torch.compile(m) for k, m in models.items()}
    with torch.no_grad():
        for model in compiled.values():
            model(*args)
        times = compare_latency({**models, **compiled}, args, repeats=repeats)
    return {
        "model": name,
        "parameters": total.parameters_after / total.parameters_before,
        "macs": (total.macs_after or 0) / (total.macs_before or 1),
        "latency": {k: {"median": t.median, "iqr": t.iqr} for k, t in times.items()},
    }


def table(records: list[dict[str, Any]]) -> str:
    """Two rows for each model."""
    rows = []
    for record in records:
        for kind in ("", ", compiled"):
            before, after = (record["latency"][f"{k}{kind}"] for k in ("before", "after"))
            row = [record["model"], "torch.compile" if kind else "eager"]
            row += [f"{100 * record['parameters']:.1f}%", f"{100 * record['macs']:.1f}%"]
            row += [f"{1e3 * t['median']:.1f} +- {1e3 * t['iqr']:.1f}" for t in (before, after)]
            rows.append([*row, f"{before['median'] / after['median']:.2f}x"])
    headers = ["model", "run by", "parameters left", "MACs left", "before ms", "after ms", "as fast"]
    return publish.markdown(rows, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=_MODELS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = [measure(name, arguments.repeats) for name in arguments.models.split(",")]
    publish.publish("pruning_latency", table(records), records, write=arguments.models == _MODELS)


if __name__ == "__main__":
    main()
