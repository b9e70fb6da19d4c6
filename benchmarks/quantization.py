"""What quantising does to a trained network, without training: EfficientNet-Lite0 on real photographs.

64 crops of five photos calibrate; 96 other crops of these photos and 96 crops of three other photos are held out. Each
row is ``remove-identity``, ``fold-batch-norm``, perhaps ``equalize-layers``, and ``Quantize`` with some options.

Run ``python benchmarks/quantization.py [--only TEXT] [--layers] [--threads 1]``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import photos
import publish
import torch
from layer_noise import signal_to_noise
from torch import Tensor, fx

import fxcompress
from fxcompress.demo_inputs import load_model
from fxcompress.passes.quantization import EqualizeLayers, Quantize

CALIBRATION, HELD_OUT = 64, 96

_ADAPTIVE = {"rounding": "adaptive"}
VARIANTS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("int8", False, {}),
    ("int8, biases not corrected", False, {"correct_bias": False}),
    ("int8, adaptive", False, _ADAPTIVE),
    *((f"int8, {name}", False, {"observer": name}) for name in ("min-max", "moving-average", "percentile", "entropy")),
    ("int8, weights per tensor", False, {"granularity": "tensor"}),
    ("the same, layers equalised", True, {"granularity": "tensor"}),
    ("4-bit weights", False, {"weight_bits": 4}),
    ("4-bit weights, biases not corrected", False, {"weight_bits": 4, "correct_bias": False}),
    ("4-bit weights, layers equalised", True, {"weight_bits": 4}),
    ("4-bit weights, adaptive", False, {"weight_bits": 4, **_ADAPTIVE}),
    ("4-bit weights in groups of 16, adaptive", False, {"weight_bits": 4, "granularity": 16, **_ADAPTIVE}),
    ("4-bit weights alone, adaptive", False, {"weight_bits": 4, "activation_bits": None, **_ADAPTIVE}),
    ("3-bit weights, adaptive", False, {"weight_bits": 3, **_ADAPTIVE}),
)
"""What the row says, whether layers are equalised first, options of Quantize."""


def measure(
    model: fx.GraphModule,
    calibration: Tensor,
    held_out: photos.HeldOut,
    options: dict[str, Any],
    equalised: bool,
    shown: bool,
) -> dict[str, Any]:
    """Agreement and error on both kinds of held-out crops, the part of the bytes that is left, and seconds."""
    before = fxcompress.compile(model, [EqualizeLayers()], calibration[:1]) if equalised else model
    start = time.perf_counter()
    batches = list(calibration.split(photos.BATCH))
    found = fxcompress.compile(before, [Quantize(**options)], calibration[:1], calibration=batches, verify=False)
    seconds = time.perf_counter() - start
    record = fxcompress.report(found).passes[-1]
    if shown:
        print(signal_to_noise(before, found, held_out["seen"][0][: photos.BATCH]))
    return {
        **photos.compared(found, held_out),
        "bytes": record.bytes_after / record.bytes_before,
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> str:
    """A row for each variant."""
    rows = []
    for record in records:
        rows.append([record["variant"], *photos.cells(record), f"{record['bytes']:.3f}", f"{record['seconds']:.0f}"])
    headers = ["quantised", "same class", "of other photos", "error", "of other photos", "bytes left", "seconds"]
    return publish.markdown(rows, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--layers", action="store_true", help="also print the signal-to-noise ratio layer by layer")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    original = load_model().eval()
    calibration, held_out = photos.draw(original, CALIBRATION, HELD_OUT)
    model = fxcompress.compile(original, ["remove-identity", "fold-batch-norm"], calibration[:1])
    records = []
    for name, equalised, options in VARIANTS:
        if arguments.only in name:
            records.append(
                {"variant": name, **measure(model, calibration, held_out, options, equalised, arguments.layers)}
            )
            print(name, records[-1], flush=True)
    publish.publish("quantization", table(records), records, write=not arguments.only)


if __name__ == "__main__":
    main()
