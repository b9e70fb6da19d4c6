"""What five minutes of learning from the original bring back, without a label, on a real network.

EfficientNet-Lite0 with its ImageNet weights is compressed, and trained by ``fxcompress.recover`` on random crops of
five photographs with nothing but the original's outputs (soft targets, and squares of the differences of logits). Held
out are other crops of these photos, and crops of three photographs that nothing has seen. *Same class* is the share of
crops with the class that the original gives, the error that of the logits (Frobenius norms). Minutes are the wall
clock's, on one thread.

Run ``python benchmarks/recovery_photos.py [--minutes 5] [--held-out 128] [--threads 1]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import photos
import publish
import torch
from torch import Tensor, fx

import fxcompress
from fxcompress.demo_inputs import crops, load_model, load_photos
from fxcompress.errors import TraceWarning
from fxcompress.pass_base import Pass
from fxcompress.passes.distillation import FeatureMatching, SoftTargets
from fxcompress.passes.low_rank import Alds
from fxcompress.passes.pruning import PruneChannels
from fxcompress.recovery import Warmup

_CALIBRATION, _UNSEEN = 64, ("coffee", "astronaut", "temple")


def variants() -> dict[str, Callable[[], Pass]]:
    """What is compressed how, by name."""
    return {
        "ALDS, 40% fewer parameters": lambda: Alds(0.4, error="activation"),
        "pruned, 50% fewer MACs": lambda: PruneChannels(0.5, measure="macs", scope="global", reconstruct=True),
    }


def stream(count: int) -> Iterator[Tensor]:
    """Batches of crops of the photos that may be seen."""
    seen = [photo for name, photo in load_photos().items() if name not in _UNSEEN]
    for number in range(count):
        yield crops(seen, photos.BATCH, seed=1000 + number)


def measure(graph: fx.GraphModule, pass_: Pass, minutes: float, calibration: Tensor, held_out: photos.HeldOut) -> Any:
    """Compress, compare, train, compare."""
    batches = list(calibration.split(photos.BATCH))
    student = fxcompress.compile(graph, [pass_], calibration[:1], calibration=batches, verify=False)
    options: dict[str, Any] = {
        "teacher": graph, "losses": [SoftTargets(temperature=1.0), FeatureMatching()], "taps": [("_fc", "_fc")],
        "optimizer": "adamw", "lr": 2e-4, "schedule": Warmup("cosine", 10), "max_norm": 1.0,
    }  # fmt: skip
    seconds = []
    for steps in (2, 2, 8):  # the first time everything is slower
        start = time.perf_counter()
        fxcompress.recover(student, stream(steps), steps=steps, **options)
        seconds.append(time.perf_counter() - start)
    each = (seconds[2] - seconds[1]) / 6
    steps = max(int((60 * minutes - seconds[1]) / each), 10)
    start = time.perf_counter()
    found = fxcompress.recover(student, stream(steps), steps=steps, **options)
    taken = time.perf_counter() - start
    total = fxcompress.report(student).total
    return {
        "removed": {"parameters": total.cr_p, "macs": total.cr_f}, "steps": steps, "seconds": taken,
        "before": photos.compared(student, held_out), "after": photos.compared(found, held_out),
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Two rows for each variant."""
    rows = []
    for record in records:
        for when in ("before", "after"):
            trained = f"{record['steps']} steps, {record['seconds'] / 60:.1f} min" if when == "after" else "no"
            rows.append([record["variant"], trained, *photos.cells(record[when])])
    headers = ["EfficientNet-Lite0", "trained", "same class", "of other photos", "error", "of other photos"]
    return publish.markdown(rows, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--held-out", type=int, default=128, help="crops of each kind")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", TraceWarning)
    original = load_model()
    calibration, held_out = photos.draw(original, _CALIBRATION, arguments.held_out)
    graph = fxcompress.compile(original, ["remove-identity", "fold-batch-norm"], calibration[:1])
    records = []
    for name, make in variants().items():
        record = measure(graph, make(), arguments.minutes, calibration, held_out)
        records.append({"variant": name, **record})
        print(records[-1], flush=True)
    publish.publish("recovery_photos", table(records), records)


if __name__ == "__main__":
    main()
