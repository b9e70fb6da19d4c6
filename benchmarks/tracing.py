"""Which models ``fxcompress.trace`` records, and whether the graphs are equal to them.

Models (see ``models.py``) are in eval mode. Each is traced on one example of batch size 1 and then compared with its
graph on inputs that tracing has not seen, at the example's size and at another batch size; *unfused* is without torch's
fused inference kernels for ``nn.MultiheadAttention``, whose rounding alone can be more than 1e-6. With ``--peers``,
``torch.fx.symbolic_trace`` (failing that, again with all arguments pinned that are not given) and
``torch.export.export`` (batch dimension ``Dim.AUTO``, on an example of batch size 2, as it takes sizes of 1 for
constants) do the same.

Run ``python benchmarks/tracing.py [--sets timm,hf] [--models REGEX] [--peers] [--jobs 2]``. Without ``--models`` the
results of the sets that ran replace those in benchmarks/results/tracing.json, and the tables are made of all of these.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import time
from collections.abc import Callable
from typing import Any

import isolated
import publish
import torch
from agreement import TOLERANCE, distance, forward
from models import SETS, Inputs, Model, Run, select
from torch import nn
from torch.utils import _pytree as pytree

import fxcompress

_OTHER_BATCH = 5
_SETS = [name for name in SETS if name != "tv-detection"]


# ------------------------------------------------------------------------------------------------------------ tracers
def _fxcompress(run: Run) -> nn.Module:
    args, kwargs = run.inputs(seed=0)
    return fxcompress.trace(run.module, args, example_kwargs=kwargs)


def _symbolic(run: Run) -> nn.Module:
    try:
        return torch.fx.symbolic_trace(run.module)
    except Exception as error:
        args, kwargs = run.inputs(seed=0)
        parameters = list(inspect.signature(run.module.forward).parameters.values())
        given = {p.name for p in parameters[: len(args)]} | set(kwargs)
        pinned = {p.name: p.default for p in parameters if p.name not in given and p.default is not p.empty}
        if not pinned:
            raise
        try:
            return torch.fx.symbolic_trace(run.module, concrete_args=pinned)
        except Exception as second:
            raise second from error


def _export(run: Run) -> nn.Module:
    args, kwargs = run.inputs(seed=0, batch=2)
    free = {0: torch.export.Dim.AUTO}
    args_dims, kwargs_dims = pytree.tree_map_only(torch.Tensor, lambda t: free, (args, kwargs))
    return torch.export.export(run.module, args, kwargs, dynamic_shapes=args_dims or kwargs_dims).module()


TRACERS: dict[str, Callable[[Run], nn.Module]] = {
    "fxcompress.trace": _fxcompress,
    "torch.fx.symbolic_trace": _symbolic,
    "torch.export.export": _export,
}


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(model: Model, stage: Callable[[str], None], tracer: str) -> dict[str, Any]:
    """Trace one model, compare; see the headers in :func:`_row` for what is kept."""
    stage("the model itself")
    run = model.run()
    fresh = run.inputs(seed=1)
    start = time.perf_counter()
    expected = forward(run.module, fresh)
    seconds = time.perf_counter() - start
    if distance(expected, forward(run.module, run.inputs(seed=2))) < 1e-3:
        raise RuntimeError("its output hardly depends on its input, so that a comparison means nothing")
    if distance(expected, forward(run.module, fresh)) > 0:
        raise RuntimeError("it gives another output when it is called again")
    stage("trace")
    start = time.perf_counter()
    graph = TRACERS[tracer](run)
    record = {"forward_seconds": seconds, "trace_seconds": time.perf_counter() - start}
    record["nodes"] = len(graph.graph.nodes)
    stage("run")
    got = forward(graph, fresh)
    if (found := distance(expected, got)) == math.inf:
        raise RuntimeError("the graph's output differs in structure, shape, dtype, integers or where it is finite")
    record |= {"distance": found, "distance_unfused": distance(_unfused(run, fresh), got) if found else 0.0}
    return record | _other_batch(run, graph)


def _unfused(run: Run, inputs: Inputs) -> Any:
    """What the model gives without torch's fused kernels for ``nn.MultiheadAttention`` and ``nn.TransformerEncoder``,
    which add up in another order than the layers do in training, and than these layers in a graph do."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return forward(run.module, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _other_batch(run: Run, graph: nn.Module) -> dict[str, Any]:
    inputs = run.inputs(seed=3, batch=_OTHER_BATCH)
    try:
        expected = _unfused(run, inputs)
    except Exception as error:
        return {"batch": f"the model itself: {type(error).__name__}: {error}"}
    try:
        found = distance(expected, forward(graph, inputs))
    except Exception as error:
        return {"batch": f"{type(error).__name__}: {error}"}
    return {"batch": "differs in structure"} if found == math.inf else {"batch": "ran", "batch_distance": found}


# ---------------------------------------------------------------------------------------------------------- the table
def table(records: list[dict[str, Any]]) -> str:
    """A row for each set and tracer, then every model that is not in a row's last columns, with the reason."""
    keys = dict.fromkeys((r["set"], r["tracer"]) for r in records)
    groups = {key: [r for r in records if (r["set"], r["tracer"]) == key] for key in keys}
    headers = ["set", "tracer", "models", "run", "traced", "bitwise equal", "<= 1e-6"]
    headers += ["<= 1e-6 unfused", "other batch <= 1e-6 unfused", "trace s, median"]
    lines = [publish.markdown([_row(*key, group) for key, group in groups.items()], headers), ""]
    ours = [f"- {r['set']} {r['model']}: {_complaint(r)}" for r in records if _complaint(r) and _is_ours(r)]
    return "\n".join([*lines, "Left out by `fxcompress.trace`:" if ours else "None is left out.", "", *ours])


def _row(set_: str, tracer: str, group: list[dict[str, Any]]) -> list[Any]:
    seconds = sorted(r["trace_seconds"] for r in group if "trace_seconds" in r)
    return [
        set_,
        tracer,
        len(group),
        sum(r.get("stage") != "the model itself" for r in group),
        sum("nodes" in r or r.get("stage") == "run" for r in group),
        sum(r.get("distance") == 0 for r in group),
        sum(r.get("distance", 1) <= TOLERANCE for r in group),
        sum(_unfused_distance(r) <= TOLERANCE for r in group),
        sum(r.get("batch_distance", 1) <= TOLERANCE for r in group),
        f"{seconds[len(seconds) // 2]:.2f}" if seconds else "-",
    ]


def _unfused_distance(record: dict[str, Any]) -> float:
    """The distance to the model without fused kernels; for records that do not have it, to the model as it runs."""
    return float(record.get("distance_unfused", record.get("distance", math.inf)))


def _is_ours(record: dict[str, Any]) -> bool:
    return record["tracer"] == "fxcompress.trace"


def _complaint(record: dict[str, Any]) -> str:
    if "error" in record:
        return isolated.first_line(record)
    if _unfused_distance(record) > TOLERANCE:
        return f"off by {_unfused_distance(record):.1e}"
    if record["batch"] != "ran":
        return f"batch size {_OTHER_BATCH}: {record['batch'].splitlines()[0]}"
    return "" if record["batch_distance"] <= TOLERANCE else f"other batch: off by {record['batch_distance']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(_SETS))
    parser.add_argument("--models", default="", help="regular expression; the results are then only printed")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=600, help="processor time for each model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = select(arguments.sets.split(","), arguments.models)
    limits = isolated.Limits(seconds=arguments.seconds, jobs=arguments.jobs)
    records = []
    for tracer in TRACERS if arguments.peers else ["fxcompress.trace"]:
        print(tracer)
        found = isolated.collect(models, functools.partial(measure, tracer=tracer), limits)
        records += [record | {"tracer": tracer} for record in found]
    if arguments.models:
        print("\n".join(r["traceback"] for r in records if r.get("traceback")))
    else:
        records = _merged(records)
    publish.publish("tracing", table(records), records, write=not arguments.models)


def _merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``records``, and those of earlier runs about other sets or tracers, in the order of the tables."""
    path = publish.RESULTS / "tracing.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    new = {(r["set"], r["tracer"]) for r in records}
    whole = records + [r for r in earlier if (r["set"], r["tracer"]) not in new]
    return sorted(whole, key=lambda r: (_SETS.index(r["set"]), list(TRACERS).index(r["tracer"]), r["model"]))


if __name__ == "__main__":
    main()
