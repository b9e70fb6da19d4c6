"""What a search finds for EfficientNet-Lite0 on real photographs, beside single passes of the same cost.

64 crops of five photos calibrate; the search judges by 48 other crops of these photos; what is shown is of 96 more of
them and of 96 crops of three other photos, which nothing has seen. Nothing is trained. Each single pass follows
``remove-identity`` and ``fold-batch-norm`` (pruning goes before that) and is told to reach the target by itself.

Run ``python benchmarks/search.py [--target latency=0.5] [--minutes 60] [--measured FILE]``. Targets that are not named
keep the rows that they have.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import photos
import publish
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.cost import cost
from fxcompress.analysis.latency import compare_latency
from fxcompress.demo_inputs import crops, load_model, load_photos
from fxcompress.errors import FxCompressError
from fxcompress.progress import Event

CALIBRATION, JUDGING, HELD_OUT, REPEATS = 64, 48, 96, 60

_EXACT = ("remove-identity", "fold-batch-norm")
_INT8 = {
    "int8": (*_EXACT, "quantize", "lower-int8"),
    "int8, min-max": (*_EXACT, "quantize:observer=min-max", "lower-int8"),
    "int8, adaptive": (*_EXACT, "quantize:rounding=adaptive", "lower-int8"),
}


def _pruned(ratio: float, measure: str, options: str = "") -> tuple[str, ...]:
    return (_EXACT[0], f"prune-channels:ratio={ratio},measure={measure},reconstruct=True{options}", _EXACT[1])


def _factorised(ratio: float, measure: str) -> tuple[str, ...]:
    return (*_EXACT, f"alds:ratio={ratio},measure={measure},error=activation")


def rivals(measure: str, part: float) -> Mapping[str, Sequence[str]]:
    """Single passes that should leave ``part`` of ``measure``."""
    ratio = round(1 - part, 3)
    size = "params" if measure in ("bytes", "params") else "macs"
    found = {
        "prune-channels": _pruned(ratio, size),
        "prune-channels, isomorphic": _pruned(ratio, size, ",scope=isomorphic"),
        "alds": _factorised(ratio, "latency" if measure == "latency" else size),
    }
    return found if measure in ("macs", "params") else {**found, **_INT8}


def measured(model: nn.Module, gm: nn.Module, held_out: photos.HeldOut, example: Tensor) -> dict[str, Any]:
    """What is left of each measure, and agreement and error on the held-out crops."""
    times = compare_latency({"model": model, "gm": gm}, (example,), repeats=REPEATS, warmup=5)
    before, after = (cost(g, (example,)) for g in (fxcompress.trace(model, example), _as_graph(gm)))
    return {
        "latency": times["gm"].median / times["model"].median,
        "macs": (after.macs or 0) / (before.macs or 1),
        "params": after.parameters / before.parameters,
        "bytes": after.bytes / before.bytes,
        **photos.compared(gm, held_out),
    }


def _as_graph(gm: nn.Module) -> fx.GraphModule:
    assert isinstance(gm, fx.GraphModule)
    return gm


def compare(measure: str, part: float, minutes: float, tries: int, file: str | None) -> list[dict[str, Any]]:
    """A record for the search and for each single pass."""
    model = load_model()
    calibration, held_out = photos.draw(model, CALIBRATION, HELD_OUT)
    seen = [photo for name, photo in load_photos().items() if name not in photos.UNSEEN]
    judging = crops(seen, JUDGING, seed=2)
    example, batches = calibration[:1], list(calibration.split(photos.BATCH))
    records = []

    def add(name: str, gm: nn.Module, seconds: float, passes: Any) -> None:
        found = measured(model, gm, held_out, example)
        record = {"target": f"{measure} {part}", "by": name, **found, "met": found[measure] <= part * 1.01}
        records.append({**record, "seconds": seconds, "passes": passes})
        print(records[-1], flush=True)

    start = time.perf_counter()
    result = fxcompress.search(
        model,
        example,
        target={measure: part},
        max_drop=1.0,
        calibration=batches,
        held_out=list(judging.split(photos.BATCH)),
        tries=tries,
        time_limit=60 * minutes,
        resume=file,
        progress=_said,
    )
    print(result, flush=True)
    best = result.within_target
    if best is not None:
        used = [p.name for p in best.passes if p.name not in (*_EXACT, "lower-int8")]
        add(f"search: {', '.join(used)}", result.module, time.perf_counter() - start, [str(p) for p in result.passes])
    for name, passes in rivals(measure, part).items():
        start = time.perf_counter()
        try:
            gm = fxcompress.compile(model, list(passes), example, calibration=batches, verify=False)
        except FxCompressError as error:
            print(f"{name}: {error}", flush=True)
            continue
        add(name, gm, time.perf_counter() - start, list(passes))
    return records


def _said(event: Event) -> None:
    if event.stage == "try" or event.done % 20 == 0:
        print(
            f"{time.strftime('%H:%M:%S')} {event.stage} {event.pass_name or ''} {event.done} {event.note}", flush=True
        )


def table(records: list[dict[str, Any]]) -> str:
    """A row for each record."""
    rows = []
    for r in records:
        left = [f"{r[m]:.3f}" for m in ("latency", "macs", "bytes")]
        rows.append([r["target"], r["by"], "yes" if r["met"] else "no", *left, *photos.cells(r), f"{r['seconds']:.0f}"])
    headers = ["target", "by", "met", "latency", "MACs", "bytes", "same class", "of other photos", "error"]
    return publish.markdown(rows, [*headers, "of other photos", "seconds"])


def _kept(targets: list[str]) -> list[dict[str, Any]]:
    """The published records of other targets."""
    path = publish.RESULTS / "search.json"
    old = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    return [r for r in old if r["target"].replace(" ", "=") not in targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", help="MEASURE=FRACTION, may be given more than once")
    parser.add_argument("--minutes", type=float, default=60, help="at most so long for each target")
    parser.add_argument("--tries", type=int, default=8, help="pipelines for each target")
    parser.add_argument("--measured", help="a file that keeps what the searches measure")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    targets = arguments.target or ["bytes=0.25", "latency=0.5", "macs=0.7"]
    records = _kept(targets)
    for target in targets:
        measure, _, part = target.partition("=")
        records += compare(measure, float(part), arguments.minutes, arguments.tries, arguments.measured)
        records.sort(key=lambda r: r["target"])
        publish.publish("search", table(records), records)


if __name__ == "__main__":
    main()
