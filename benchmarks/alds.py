"""How good the choice of ranks is, how near to the budget, and what it costs.

For each network and ratio, with batch norms folded: the largest error (``operator``, the objective of the ALDS paper)
that :func:`least_maximum` reaches and the sum of squared errors (``frobenius``) that :func:`least_sum` reaches with
its gap to the bound; what went of the parameters beside what was asked for; and seconds by the clock for the tables of
all layers (every number of slices, one scheme) and for the solver. The torchvision networks have random live weights,
EfficientNet-Lite0 its trained ones.

Run ``python benchmarks/alds.py [--models REGEX] [--threads 1] [--schemes 0]``.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import publish
import torch
from models import select
from torch import fx

import fxcompress
from fxcompress.analysis.cost import cost
from fxcompress.demo_inputs import load_model
from fxcompress.errors import TraceWarning
from fxcompress.pass_base import Example, PassContext
from fxcompress.passes.low_rank.allocate import Options, Unreachable, least_maximum, least_sum
from fxcompress.passes.low_rank.errors import ErrorMeasure, Frobenius, Operator
from fxcompress.passes.low_rank.layers import Survey
from fxcompress.passes.low_rank.tables import Table, table_of

_MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2")
_RATIOS = (0.3, 0.5, 0.65, 0.8)


def graphs(pattern: str) -> Iterator[tuple[str, fx.GraphModule, Any]]:
    """Name, graph with folded batch norms, and inputs."""
    for model in select(["tv-classification"], f"^({'|'.join(_MODELS)})$"):
        if re.search(pattern, model.name):
            run = model.run()
            args, _ = run.inputs(seed=0)
            yield (
                model.name,
                fxcompress.compile(run.module, ["remove-identity", "fold-batch-norm"], args, verify=False),
                args,
            )
    if re.search(pattern, "efficientnet-lite0"):
        args = (torch.randn(1, 3, 224, 224),)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TraceWarning)  # about training mode
            graph = fxcompress.compile(load_model(), ["remove-identity", "fold-batch-norm"], args, verify=False)
        yield "efficientnet-lite0, trained", graph, args


def tables(context: PassContext, measure: ErrorMeasure, schemes: tuple[int, ...]) -> list[Table]:
    """The options of every layer."""
    return [
        table_of(c.path, c.layer, c.places(context, schemes), measure, schemes, lambda k: True, {}, "params")
        for c in Survey(context).candidates
    ]


def measured(name: str, graph: fx.GraphModule, args: Any, schemes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A record for each ratio."""
    whole = cost(graph).parameters
    context = PassContext(graph, Example(args))
    start = time.perf_counter()
    by_error = {"operator": tables(context, Operator(), schemes)}
    seconds = time.perf_counter() - start
    by_error["frobenius"] = tables(context, Frobenius(), schemes)
    for ratio in _RATIOS:
        record: dict[str, Any] = {"model": name, "ratio": ratio, "tables": seconds, "whole": whole}
        for error, solver in (("operator", least_maximum), ("frobenius", least_sum)):
            found = by_error[error]
            others = whole - sum(int(t.parameters[0]) for t in found)
            start = time.perf_counter()
            try:
                chosen = solver([Options(t.parameters, t.error) for t in found], (1 - ratio) * whole - others)
            except Unreachable:
                record[error] = None
                continue
            solving = time.perf_counter() - start
            left = others + sum(int(t.parameters[i]) for t, i in zip(found, chosen.choice, strict=True))
            slices = sorted(int(t.slices[i]) for t, i in zip(found, chosen.choice, strict=True) if i)
            record[error] = {
                "value": chosen.value, "bound": chosen.bound, "removed": 1 - left / whole, "seconds": solving,
                "slices": slices[len(slices) // 2] if slices else 0,
            }  # fmt: skip
        yield record


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each network and ratio."""
    rows = []
    for r in records:
        row = [r["model"], f"{r['ratio']:.0%}"]
        for error in ("operator", "frobenius"):
            found = r[error]
            if found is None:
                row += ["not reachable", "", "", ""]
                continue
            gap = (found["value"] - found["bound"]) / found["value"] if found["value"] else 0.0
            row += [f"{found['value']:.4f}", f"{found['removed']:.2%}", f"{1e3 * found['seconds']:.0f}"]
            row.append(str(found["slices"]) if error == "operator" else f"{gap:.1e}")
        rows.append([*row, f"{r['tables']:.1f}"])
    headers = ["model", "asked", "largest error", "CR-P", "ms", "median k", "sum of squares", "CR-P", "ms", "gap"]
    return publish.markdown(rows, [*headers, "tables s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemes", default="0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    schemes = tuple(int(s) for s in arguments.schemes.split(","))
    records = [r for name, graph, args in graphs(arguments.models) for r in measured(name, graph, args, schemes)]
    publish.publish("alds", table(records), records, write=not arguments.models and arguments.schemes == "0")


if __name__ == "__main__":
    main()
