"""What presets, and what they were chosen from, make of a trained network: EfficientNet-Lite0 on real photographs.

64 crops of five photos calibrate; 192 other crops of these photos and 192 crops of three other photos are held out. The
latency is that of one photo, the fastest of 200 calls made in turns with all other rows: what else a machine has to do
makes calls slower and none faster.

Run ``python benchmarks/presets.py [--only TEXT] [--threads 1]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import photos
import publish
import torch
from torch import nn

import fxcompress
from fxcompress.analysis.latency import compare_latency
from fxcompress.demo_inputs import load_model
from fxcompress.errors import TraceWarning

CALIBRATION, HELD_OUT = 64, 192

_START = ["remove-identity", "fold-batch-norm"]
_INT8 = ["quantize", "lower-int8"]


def _pruned(ratio: float) -> str:
    return f"prune-channels:ratio={ratio},measure=macs,reconstruct=True"


def _alds(ratio: float) -> str:
    return f"alds:ratio={ratio},error=activation"


CANDIDATES: dict[str, list[str]] = {
    **{f"preset {name}": passes for name, passes in fxcompress.presets().items()},
    "folded": _START,
    "bfloat16": [*_START, "cast-precision"],
    "int8 weights": [*_START, "quantize:activation_bits=None"],
    "int8, min-max": [*_START, "quantize:observer=min-max", "lower-int8"],
    "int8, adaptive": [*_START, "quantize:rounding=adaptive", "lower-int8"],
    "ALDS 5%, int8": [*_START, _alds(0.05), *_INT8],
    "ALDS 10%, int8": [*_START, _alds(0.1), *_INT8],
    "ALDS 30%, int8": [*_START, _alds(0.3), *_INT8],
    "5% of MACs pruned, int8": ["remove-identity", _pruned(0.05), "fold-batch-norm", *_INT8],
    "10% of MACs pruned, int8": ["remove-identity", _pruned(0.1), "fold-batch-norm", *_INT8],
}
"""The presets, and what they were chosen from."""

NOISE = "`fast-cpu` and `accurate` run the same kernels: what their latencies differ by is noise of the machine."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", TraceWarning)
    model = load_model()
    calibration, held_out = photos.draw(model, CALIBRATION, HELD_OUT)
    batches = list(calibration.split(photos.BATCH))
    example = calibration[:1]
    models: dict[str, nn.Module] = {"original": model}
    records: list[dict[str, Any]] = [{"network": "original", "passes": [], **photos.compared(model, held_out)}]
    for name, passes in CANDIDATES.items():
        if arguments.only in name:
            start = time.perf_counter()
            gm = fxcompress.compile(model, passes, example, calibration=batches, verify=False)
            record = {"network": name, "passes": passes, "seconds": time.perf_counter() - start}
            models[name] = gm
            total = fxcompress.report(gm).total
            records[0]["bytes"] = total.bytes_before
            records.append({**record, "bytes": total.bytes_after, **photos.compared(gm, held_out)})
            print(records[-1], flush=True)
    found = compare_latency(models, (example,), repeats=200, threads=arguments.threads)
    for record in records:
        latency = found[record["network"]]
        record.update(fastest=latency.min, median=latency.median, iqr=latency.iqr)
    publish.publish("presets", table(records), records, write=not arguments.only)


def table(records: list[dict[str, Any]]) -> str:
    """A row for each network."""
    rows = []
    for record in records:
        latency = f"{1e3 * record['fastest']:.2f} ms"
        size, seconds = f"{record['bytes'] / 2**20:.2f} MiB", f"{record.get('seconds', 0):.0f}"
        rows.append([record["network"], *photos.cells(record), size, latency, seconds])
    headers = ["EfficientNet-Lite0", "same class", "of other photos", "error", "of other photos", "bytes", "latency"]
    return f"{publish.markdown(rows, [*headers, 'seconds'])}\n\n{NOISE}"


if __name__ == "__main__":
    main()
