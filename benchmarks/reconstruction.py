"""What refitting by least squares brings back after channel pruning, beside batch norm statistics estimated anew.

EfficientNet-Lite0 with its ImageNet weights, pruned to fewer multiply-accumulates (``PruneChannels``, L2 norms) without
any training: as it is, with ``adapt-batch-norm``, with ``reconstruct=True``, and with both. Calibration data are random
crops of five photographs. Held out are other crops of these five, and crops of three photographs that nothing has seen.
*Same class* is the share of crops with the class that the original gives, the error that of the logits (Frobenius
norms). The row with nothing removed shows what ``adapt-batch-norm`` alone does to the unpruned network on these data.

Run ``python benchmarks/reconstruction.py [--ratios 0.1,0.2,0.3,0.5] [--calibration 64] [--held-out 96] [--scope global]
[--no-write]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import publish
import torch
from photos import BATCH, HeldOut, cells, compared, draw
from torch import Tensor, fx

import fxcompress
from fxcompress.demo_inputs import load_model
from fxcompress.errors import TraceWarning
from fxcompress.pass_base import Pass
from fxcompress.passes.adapt_batch_norm import AdaptBatchNorm
from fxcompress.passes.pruning import PruneChannels


def variants(ratio: float, scope: Any) -> dict[str, list[Pass]]:
    """What is compared, by name."""
    if not ratio:
        return {"nothing": [], "adapt-batch-norm": [AdaptBatchNorm()]}
    plain = PruneChannels(ratio=ratio, measure="macs", scope=scope)
    refitted = PruneChannels(ratio=ratio, measure="macs", scope=scope, reconstruct=True)
    return {
        "nothing": [plain],
        "adapt-batch-norm": [plain, AdaptBatchNorm()],
        "reconstruct": [refitted],
        "reconstruct, then adapt-batch-norm": [refitted, AdaptBatchNorm()],
    }


def measure(graph: fx.GraphModule, passes: list[Pass], calibration: Tensor, held_out: HeldOut) -> dict[str, Any]:
    """Compress ``graph`` and compare it with what it gave; seconds are processor time."""
    start = time.process_time()
    batches = list(calibration.split(BATCH))
    found = fxcompress.compile(graph, passes, calibration[:1], calibration=batches, verify=False)
    record = {"seconds": time.process_time() - start, "removed": fxcompress.report(found).total.cr_f}
    return record | compared(found, held_out)


def table(records: list[dict[str, Any]]) -> str:
    """A row for each ratio and variant."""
    rows = []
    for r in records:
        rows.append([r["variant"], f"{r['removed']:.1f}%", *cells(r), f"{r['seconds']:.0f}"])
    headers = ["after pruning", "MACs removed", "same class", "other photos", "error", "other photos", "s"]
    return publish.markdown(rows, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="0,0.1,0.2,0.3,0.5")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=96, help="crops of each kind")
    parser.add_argument("--scope", default="global")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model()
    calibration, held_out = draw(model, arguments.calibration, arguments.held_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)  # about training mode
        graph = fxcompress.trace(model, calibration[:1])
    records = []
    for ratio in map(float, arguments.ratios.split(",")):
        for name, passes in variants(ratio, arguments.scope).items():
            records.append({"variant": name, "ratio": ratio, **measure(graph, passes, calibration, held_out)})
            print(table(records[-1:]).splitlines()[-1], flush=True)
    publish.publish("reconstruction", table(records), records, write=not arguments.no_write)


if __name__ == "__main__":
    main()
