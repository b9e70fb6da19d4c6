"""The detection models of torchvision, whose Python looks at tensor data: traced with ``opaque="auto"``.

What looks at data stays one call; everything else is in the graph. A parameter is *visible* to passes if the graph
calls a plain layer of ``torch.nn`` that owns it. Graphs are compared with the models, bit by bit, on the example and on
other images of the same sizes.

Run ``python benchmarks/detection.py [--models REGEX] [--jobs 2]``; with ``--models`` the results are only printed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import isolated
import publish
import torch
from agreement import distance, forward
from models import Model, select
from torch import fx, nn

import fxcompress


def measure(model: Model, stage: Callable[[str], None]) -> dict[str, Any]:
    """Trace one model and compare it; a distance of ``None`` is one that cannot be put into a number."""
    stage("the model itself")
    run = model.run()
    example, fresh = run.inputs(seed=0), run.inputs(seed=1)
    start = time.perf_counter()
    expected = {"example": forward(run.module, example), "fresh": forward(run.module, fresh)}
    seconds = (time.perf_counter() - start) / 2
    if distance(expected["example"], forward(run.module, example)) > 0:
        raise RuntimeError("it gives another output when it is called again")
    stage("trace")
    start = time.perf_counter()
    graph = fxcompress.trace(run.module, example[0], opaque="auto")
    record = {"forward_seconds": seconds, "trace_seconds": time.perf_counter() - start}
    stage("run")
    for name, inputs in (("example", example), ("fresh", fresh)):
        found = distance(expected[name], forward(graph, inputs))
        record[name] = None if found == math.inf else found
    return record | {"nodes": len(graph.graph.nodes), **visibility(graph, run.module)}


def visibility(graph: fx.GraphModule, module: nn.Module) -> dict[str, Any]:
    """How many parameters there are, how many belong to layers that the graph calls, and which modules are opaque."""
    called = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    layers = [m for m in called if type(m).__module__.startswith("torch.nn.modules.")]
    opaque = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    opaque = [t for t in sorted(opaque) if not type(graph.get_submodule(t)).__module__.startswith("torch.nn.modules.")]
    seen = {id(p): p.numel() for layer in layers for p in layer.parameters()}
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "visible": sum(seen.values()),
        "opaque": opaque,
    }


def table(records: list[dict[str, Any]]) -> str:
    """A row for each model, then what went wrong."""
    headers = ["model", "traced", "equal, example", "equal, fresh images", "parameters", "visible", "opaque modules"]
    return publish.markdown([_row(r) for r in records], headers) + isolated.failures(records)


def _row(record: dict[str, Any]) -> list[str]:
    if "error" in record:
        return [record["model"], "no", *[""] * 5]
    share = 100 * record["visible"] / record["parameters"]
    equal = [{0: "bitwise", None: "no"}.get(record[k], f"off by {record[k]}") for k in ("example", "fresh")]
    opaque = ", ".join(record["opaque"])
    return [record["model"], "yes", *equal, f"{record['parameters'] / 1e6:.1f} M", f"{share:.1f}%", opaque]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="regular expression")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limits = isolated.Limits(jobs=arguments.jobs)
    records = isolated.collect(select(["tv-detection"], arguments.models), measure, limits)
    publish.publish("detection", table(records), records, write=not arguments.models)


if __name__ == "__main__":
    main()
