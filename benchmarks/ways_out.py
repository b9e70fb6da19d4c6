"""What compressed graphs cost in other runtimes: EfficientNet-Lite0 with its trained weights, one photo, one thread.

For each graph the size of the ONNX file, whether the runtime gives what the graph module gives, and its latency. Needs
the extras ``demo`` and ``bench``; writes ``results/ways_out.md`` and ``.json`` (not with ``--dry-run``).
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import clock
import onnxruntime
import openvino
import torch
from publish import markdown, publish
from torch import Tensor, fx

import fxcompress
from fxcompress.demo_inputs import crops, load_model, load_photos

FOLD = ["remove-identity", "fold-batch-norm"]
PRUNE = "prune-channels:ratio=0.2,measure=macs"
GRAPHS: dict[str, list[str]] = {
    "folded": FOLD,
    "pruned, 20% fewer MACs": ["remove-identity", f"{PRUNE},reconstruct=True", *FOLD[1:]],
    "the same, channels by 16": ["remove-identity", f"{PRUNE},reconstruct=True,round_to=16", *FOLD[1:]],
    "ALDS, 30% fewer parameters": [*FOLD, "alds:ratio=0.3,error=activation"],
    "int8": [*FOLD, "quantize"],
    "int8, both addends": [*FOLD, "quantize:round_addends=True"],
    "int8, weights alone": [*FOLD, "quantize:activation_bits=None"],
    "ALDS and int8, both addends": [*FOLD, "alds:ratio=0.3,error=activation", "quantize:round_addends=True"],
}
LOWERED = "on oneDNN's kernels"
Call = Callable[[Tensor], Any]


def onnxruntime_call(path: Path) -> Call:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


def openvino_call(model: Any) -> Call:
    """For a batch of one, one thread, float32 where nothing is quantised."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda x: compiled([x.numpy()])[0]


def calls(gm: fx.GraphModule, x: Tensor, path: Path) -> dict[str, Call]:
    """By runtime."""
    fxcompress.export_onnx(gm, path, x)
    return {
        "eager": gm,
        "ONNX Runtime": onnxruntime_call(path),
        "OpenVINO": openvino_call(openvino.convert_model(path)),
    }


def differences(call: Call, gm: fx.GraphModule, data: Tensor) -> dict[str, float]:
    """From the graph module, over ``data`` one by one: relative to the largest output, and how often another class."""
    ours = torch.cat([gm(x) for x in data.split(1)])
    theirs = torch.cat([torch.as_tensor(call(x)) for x in data.split(1)])
    error = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return {"error": error, "same class": (ours.argmax(1) == theirs.argmax(1)).float().mean().item()}


def latencies(timed: dict[str, Call], x: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Medians, all calls in turn so that what else the machine does hits all alike."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
    for round_, (name, call) in itertools.product(range(repeats + 3), timed.items()):
        taken = clock.seconds(lambda call=call: call(x))
        if round_ >= 3:
            times[name].append(taken)
    return {name: clock.medians(taken) for name, taken in times.items()}


def _row(name: str, record: dict[str, Any]) -> list[str]:
    cells = [name, f"{record['bytes'] / 1e6:.1f} MB"]
    cells.append(f"{record['runtimes']['eager']['cpu'] * 1e3:.1f} ms")
    for runtime, found in record["runtimes"].items():
        if runtime != "eager":
            cells += [f"{found['cpu'] * 1e3:.1f} ms", f"{found['error']:.0e} / {found['same class']:.0%}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, photos = load_model(), list(load_photos().values())
    x, data = crops(photos, 1, seed=3), crops(photos, 32, seed=5)
    calibration = list(crops(photos, 64, seed=7).split(8))
    records, timed = {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, (name, passes) in enumerate(GRAPHS.items()):
            path = Path(folder) / f"{number}.onnx"
            with torch.enable_grad():
                gm = fxcompress.compile(model, passes, x, calibration=calibration)
            found = calls(gm, x, path)
            timed |= {(name, runtime): call for runtime, call in found.items()}
            records[name] = {"passes": passes, "bytes": path.stat().st_size, "runtimes": {}}
            for runtime, call in found.items():
                records[name]["runtimes"][runtime] = differences(call, gm, data)
            if name == "int8":
                timed[name, LOWERED] = fxcompress.compile(gm, ["lower-int8"], x, calibration=calibration[:1])
        for (name, runtime), taken in latencies(timed, x, arguments.repeats).items():
            records[name]["runtimes"].setdefault(runtime, {}).update(taken)
    lowered = records["int8"]["runtimes"].pop(LOWERED)
    headers = ["EfficientNet-Lite0", "ONNX file", "eager"]
    for runtime in list(timed)[1:3]:
        headers += [runtime[1], "error / same class"]
    text = markdown([_row(name, record) for name, record in records.items()], headers)
    text += (
        f"\n\nThe int8 graph after `lower-int8`, in PyTorch: {lowered['cpu'] * 1e3:.1f} ms. One photo, one thread;\n"
    )
    text += "medians of processor time. Error: the largest difference from the graph module, relative to the largest\n"
    text += "output, over 32 other photos."
    publish("ways_out", text, {"graphs": records, "lowered": lowered}, write=not arguments.dry_run)


if __name__ == "__main__":
    main()
