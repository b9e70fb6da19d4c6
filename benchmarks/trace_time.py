"""How long tracing takes beside running the model: the goal on ResNet-50 is 5 forward passes and 1 second.

Everything is measured in one process on one example, in turns, so that noise hits all alike; the numbers are medians.
The peers record less: ``torch.fx.symbolic_trace`` does not run the model, nor does ``torch.export.export`` (it runs
stand-ins without values), and neither compares its graph with the model. ``-`` is a failure.

Run ``python benchmarks/trace_time.py [--models REGEX] [--repeats 5] [--batch 1] [--threads 1] [--clock cpu]``; with
``--models`` the results are only printed. Where the machine is busy with other things, ``--clock cpu`` (see
``clock.py``) is the honest one.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import clock
import isolated
import publish
import torch
from agreement import forward
from models import Model, select

import fxcompress

_MODELS = ["resnet50", "resnet18", "vit_b_16", "swin_t", "bert"]
_FORWARDS = 3
"""Forward passes a round; everything else happens once a round."""


def measure(model: Model, stage: Callable[[str], None], repeats: int, batch: int, threads: int) -> dict[str, Any]:
    """Medians of seconds; a peer that fails has its error under its name instead."""
    stage("the model itself")
    torch.set_num_threads(threads)
    run = model.run()
    args, kwargs = run.inputs(seed=0, batch=batch)
    forward(run.module, (args, kwargs))
    tracers = {
        "trace": lambda: fxcompress.trace(run.module, args, example_kwargs=kwargs),
        "symbolic_trace": lambda: torch.fx.symbolic_trace(run.module),
        "export": lambda: torch.export.export(run.module, args, kwargs),
    }
    seconds: dict[str, list[clock.Seconds]] = {"forward": []}
    errors = {}
    for _ in range(repeats):
        seconds["forward"] += [clock.seconds(lambda: forward(run.module, (args, kwargs))) for _ in range(_FORWARDS)]
        for name, tracer in tracers.items():
            stage(name)
            if name in errors:
                continue
            try:
                seconds.setdefault(name, []).append(clock.seconds(tracer))
            except Exception as error:
                if name == "trace":
                    raise
                errors[name] = f"{type(error).__name__}: {error}"
    medians = {name: clock.medians(times) for name, times in seconds.items() if times}
    return {"medians": medians, "all": seconds, "errors": errors}


def table(records: list[dict[str, Any]], by: str) -> str:
    """A row for each model, in seconds by one of the clocks."""
    headers = ["model", "forward s", "fxcompress.trace s", "goal s (5 x forward + 1)", "met"]
    headers += ["torch.fx.symbolic_trace s", "torch.export.export s"]
    rows = [_row(r, by) for r in records]
    return publish.markdown(rows, headers) + f"\n\nSeconds by the {by} clock." + isolated.failures(records)


def _row(record: dict[str, Any], by: str) -> list[str]:
    if "error" in record:
        return [record["model"], "failed", *[""] * 5]
    medians = {name: m[by] for name, m in record["medians"].items()}
    goal = 5 * medians["forward"] + 1
    numbers = [f"{n:.3f}" for n in (medians["forward"], medians["trace"], goal)]
    peers = [f"{medians[n]:.3f}" if n in medians else "-" for n in ("symbolic_trace", "export")]
    return [record["model"], *numbers, "yes" if medians["trace"] <= goal else "no", *peers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="regular expression")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=clock.CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {m.name: m for m in select(["tv-classification", "hf"], arguments.models) if m.name in _MODELS}
    chosen = [known[name] for name in _MODELS if name in known]
    how = {"repeats": arguments.repeats, "batch": arguments.batch, "threads": arguments.threads}
    records = isolated.collect(chosen, functools.partial(measure, **how))
    text = table(records, arguments.clock)
    publish.publish("trace_time", text, {"options": how, "models": records}, write=not arguments.models)


if __name__ == "__main__":
    main()
