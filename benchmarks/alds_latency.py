"""Whether a latency budget is kept: a network decomposed to a part of its own time on this machine.

``Alds(ratio=0.4, measure="latency")`` on random live weights with batch norms folded, one image of 224 x 224, eager and
under ``torch.compile``; all are timed in turns. Beside it the same network with half of its parameters, chosen without
regard to time. Medians +- interquartile range.

Run ``python benchmarks/alds_latency.py [--models resnet50] [--ratio 0.4] [--repeats 30] [--threads 1]``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import publish
import torch
from models import select

import fxcompress
from fxcompress.analysis.latency import compare_latency
from fxcompress.passes.low_rank import Alds

_MODELS = "resnet50"


def measure(name: str, ratio: float, repeats: int) -> dict[str, Any]:
    """Latencies in seconds, and what is left of parameters and MACs."""
    run = next(m for m in select(["tv-classification"], f"^{name}$")).run()
    args, _ = run.inputs(seed=0)
    folded = fxcompress.compile(run.module, ["remove-identity", "fold-batch-norm"], args)
    start = time.perf_counter()
    passes = {"a latency budget": Alds(ratio, measure="latency"), "half the parameters": Alds(0.5)}
    models = {"before": folded}
    left: dict[str, Any] = {}
    for kind, pass_ in passes.items():
        models[kind] = fxcompress.compile(folded, [pass_], args, verify=False)
        record = fxcompress.report(models[kind]).passes[-1]
        whole = sum(d["rank"] is None for d in record.details)
        left[kind] = {
            "parameters": record.parameters_after / record.parameters_before,
            "macs": (record.macs_after or 0) / (record.macs_before or 1),
            "whole": f"{whole} of {len(record.details)}",
            "seconds": time.perf_counter() - start,
        }
        start = time.perf_counter()
    compiled = {f"{k}, compiled": torch.compile(m) for k, m in models.items()}
    with torch.no_grad():
        for model in compiled.values():
            model(*args)
        times = compare_latency({**models, **compiled}, args, repeats=repeats)
    latency = {k: {"median": t.median, "iqr": t.iqr} for k, t in times.items()}
    return {"model": name, "ratio": ratio, "left": left, "latency": latency}


def table(records: list[dict[str, Any]]) -> str:
    """Two rows for each model and way of choosing."""
    rows = []
    for record in records:
        for kind, left in record["left"].items():
            for way in ("", ", compiled"):
                before, after = (record["latency"][f"{k}{way}"] for k in ("before", kind))
                row = [record["model"], kind, "torch.compile" if way else "eager"]
                row += [f"{100 * left['parameters']:.1f}%", f"{100 * left['macs']:.1f}%", left["whole"]]
                row += [f"{1e3 * t['median']:.1f} +- {1e3 * t['iqr']:.1f}" for t in (before, after)]
                rows.append([*row, f"{after['median'] / before['median']:.2f}", f"{left['seconds']:.0f}"])
    headers = ["model", "asked for", "run by", "parameters left", "MACs left", "layers whole"]
    return publish.markdown(rows, [*headers, "before ms", "after ms", "after / before", "search s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=_MODELS)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = [measure(name, arguments.ratio, arguments.repeats) for name in arguments.models.split(",")]
    publish.publish("alds_latency", table(records), records, write=arguments.models == _MODELS)


if __name__ == "__main__":
    main()
