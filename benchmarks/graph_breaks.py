"""``torch.compile`` of what ``fxcompress.compile`` returns: graph breaks, and whether it computes the same.

The backend is inductor where there is a C++ compiler, else ``aot_eager``; the table says which.

Run ``python benchmarks/graph_breaks.py [--models REGEX]``; with ``--models`` the results are only printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import isolated
import publish
import torch
from agreement import distance, forward
from models import Model, select

import fxcompress
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.passes.remove_identity import RemoveIdentity

_MODELS = ["resnet18", "mobilenet_v2", "vit_b_16", "bert"]


def measure(model: Model, stage: Callable[[str], None]) -> dict[str, Any]:
    """Compress one model, ask Dynamo about breaks, compile it and compare on inputs that nothing has seen."""
    stage("the model itself")
    torch._inductor.config.compile_threads = 1
    run = model.run()
    args, kwargs = run.inputs(seed=0)
    stage("fxcompress.compile")
    small = fxcompress.compile(run.module, [RemoveIdentity(), FoldBatchNorm()], args, example_kwargs=kwargs)
    stage("explain")
    explained = torch._dynamo.explain(small)(*args, **kwargs)
    torch._dynamo.reset()
    stage("torch.compile")
    compiled = torch.compile(small, backend=_backend(), fullgraph=True)
    start = time.perf_counter()
    forward(compiled, (args, kwargs))
    seconds = time.perf_counter() - start
    fresh = run.inputs(seed=1)
    return {
        "backend": _backend(),
        "graphs": explained.graph_count,
        "breaks": explained.graph_break_count,
        "reasons": [str(reason) for reason in explained.break_reasons],
        "compile_seconds": seconds,
        "from_eager": distance(forward(small, fresh), forward(compiled, fresh)),
        "from_model": distance(forward(run.module, fresh), forward(compiled, fresh)),
    }


def _backend() -> str:
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return "inductor" if found else "aot_eager"


def table(records: list[dict[str, Any]]) -> str:
    """A row for each model."""
    headers = ["model", "backend", "graphs", "graph breaks", "error against eager", "error against the model"]
    headers += ["first call s"]
    return publish.markdown([_row(r) for r in records], headers) + isolated.failures(records)


def _row(r: dict[str, Any]) -> list[str]:
    if "error" in r:
        return [r["model"], "failed", *[""] * 5]
    errors = [f"{r['from_eager']:.1e}", f"{r['from_model']:.1e}"]
    return [r["model"], r["backend"], str(r["graphs"]), str(r["breaks"]), *errors, f"{r['compile_seconds']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="regular expression")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {m.name: m for m in select(["tv-classification", "hf"], arguments.models) if m.name in _MODELS}
    chosen = [known[name] for name in _MODELS if name in known]
    records = isolated.collect(chosen, measure)
    publish.publish("graph_breaks", table(records), records, write=not arguments.models)


if __name__ == "__main__":
    main()
