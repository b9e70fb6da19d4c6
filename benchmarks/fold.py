"""``FoldBatchNorm`` on every classification model of torchvision: how exact it is, and what it leaves and why.

The error is that of the rerun in float64 which proves the pass, relative to the largest output; the goal is 1e-12.
A second table has the latency before and after on a few models, measured in turns, beside
``torch.fx.experimental.optimization.fuse``.

Run ``python benchmarks/fold.py [--models REGEX] [--jobs 2] [--repeats 20]``; with ``--models`` the results are only
printed.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import isolated
import publish
import torch
from agreement import distance, forward
from models import Model, Run, select
from torch import fx
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm

import fxcompress
from fxcompress.analysis.latency import compare_latency
from fxcompress.passes.fold_batch_norm import FoldBatchNorm

_GOAL = 1e-12
_NAME = re.compile(r" (\(node )?'[^']*'\)?")
"""The names in a reason, without which reasons of one kind are the same text."""
_TIMED = ("resnet18", "mobilenet_v2", "densenet121")


def measure(model: Model, stage: Callable[[str], None]) -> dict[str, Any]:
    """Fold one model; compare on inputs that the pass has not seen."""
    stage("the model itself")
    run = model.run()
    args, kwargs = run.inputs(seed=0)
    stage("fold")
    before = _batch_norms(fxcompress.trace(run.module, args, example_kwargs=kwargs))
    folded = fxcompress.compile(run.module, [FoldBatchNorm()], args, example_kwargs=kwargs)
    done = fxcompress.report(folded).passes[0]
    fresh = run.inputs(seed=1)
    apart = distance(forward(run.module, fresh), forward(folded, fresh))
    return {
        "before": before,
        "left": _batch_norms(folded),
        "error_float64": done.error,
        "error_float32": None if apart == math.inf else apart,
        "refusals": [[refusal.target, refusal.reason] for refusal in done.refusals],
        "fold_seconds": done.seconds,
    }


def _batch_norms(graph: fx.GraphModule) -> int:
    """How many calls of a batch norm are in ``graph``, as modules or as functions."""
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    functions = [n for n in graph.graph.nodes if n.op == "call_function" and "batch_norm" in str(n.target)]
    return len(functions) + sum(isinstance(graph.get_submodule(n.target), _BatchNorm) for n in calls)


def measure_latency(model: Model, stage: Callable[[str], None], repeats: int) -> dict[str, Any]:
    """Seconds of one run: the model, the folded graph and the peer's, and how far the latter two are off."""
    stage("the model itself")
    run = model.run()
    args, _ = run.inputs(seed=0)
    stage("fold")
    candidates = {
        "before": run.module,
        "folded": fxcompress.compile(run.module, [FoldBatchNorm()], args),
        "fuse": optimization.fuse(run.module),
    }
    stage("time")
    timed = compare_latency(candidates, args, repeats=repeats)
    result = {name: {"median": t.median, "iqr": t.iqr} for name, t in timed.items()}
    return {"latency": result, "fuse_left": _batch_norms(candidates["fuse"]), "apart": _apart(run, candidates)}


def _apart(run: Run, candidates: dict[str, Any]) -> dict[str, float]:
    fresh = run.inputs(seed=1)
    expected = forward(run.module, fresh)
    return {name: distance(expected, forward(module, fresh)) for name, module in candidates.items()}


def table(records: list[dict[str, Any]]) -> str:
    """A row for each model with batch norms, then the sums, the reasons, and what went wrong."""
    good = [r for r in records if "error" not in r]
    rows = [_row(r) for r in good if r["before"]]
    headers = ["model", "batch norms", "left", "error, float64", f"<= {_GOAL:.0e}", "error, float32", "s"]
    plain = [r["model"] for r in good if not r["before"]]
    lines = [publish.markdown(rows, headers), "", f"Without batch norm: {', '.join(plain) or 'none'}.", ""]
    reasons: dict[str, list[str]] = {}
    for r in good:
        for target, reason in r["refusals"]:
            reasons.setdefault(_NAME.sub("", reason), []).append(f"{r['model']} {target}")
    lines += [f"- {len(places)} left, such as {places[0]}: {reason}" for reason, places in reasons.items()]
    return "\n".join(lines) + isolated.failures(records)


def _row(r: dict[str, Any]) -> list[str]:
    exact, single = r["error_float64"], r["error_float32"]
    met = "no" if exact is None or exact > _GOAL else "yes"
    numbers = ["-" if n is None else f"{n:.1e}" for n in (exact, single)]
    return [r["model"], str(r["before"]), str(r["left"]), numbers[0], met, numbers[1], f"{r['fold_seconds']:.1f}"]


def latency_table(records: list[dict[str, Any]]) -> str:
    """A row for each model: milliseconds, noise, and the peer."""
    headers = ["model", "before ms", "folded ms", "torch fuse ms", "folded error", "fuse error", "fuse leaves"]
    return publish.markdown([_latency_row(r) for r in records], headers) + isolated.failures(records)


def _latency_row(r: dict[str, Any]) -> list[str]:
    if "error" in r:
        return [r["model"], "failed", *[""] * 5]
    times = [f"{1e3 * t['median']:.1f} +- {1e3 * t['iqr']:.1f}" for t in r["latency"].values()]
    return [r["model"], *times, f"{r['apart']['folded']:.1e}", f"{r['apart']['fuse']:.1e}", str(r["fuse_left"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="regular expression")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = select(["tv-classification"], arguments.models)
    timed = [m for m in models if m.name in _TIMED]
    latencies = isolated.collect(timed, functools.partial(measure_latency, repeats=arguments.repeats))
    print(latency_table(latencies), flush=True)
    records = isolated.collect(models, measure, isolated.Limits(jobs=arguments.jobs))
    text = "\n\n".join([table(records), latency_table(latencies)])
    publish.publish("fold", text, {"models": records, "latency": latencies}, write=not arguments.models)


if __name__ == "__main__":
    main()
