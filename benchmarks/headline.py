"""The headline: a network compressed by several passes at once, beside what others make of the uncompressed one.

EfficientNet-Lite0 has its trained weights and real photos: each of the pipelines in :data:`STACKS` is held
against the original's classes on held-out crops. ResNet-50, MobileNetV2 and ViT-B/16 have random
weights, which say nothing about accuracy; they show what stacks cost in time, one of which would want training.

Ours run as lowered graphs, as reference graphs under ``torch.compile`` with frozen weights, and in OpenVINO by way of
ONNX, with both addends of each sum rounded, as OpenVINO adds integers alone (``round_addends``). The peers are those of
``int8_peers.py``, from the uncompressed network. All calls take turns.

Run ``python benchmarks/headline.py [--models efficientnet_lite0,resnet50] [--rounds 30] [--dry-run]``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import int8
import isolated
import photos
import publish
import torch
from int8_peers import VARIANTS, Call, Workbench
from models import Inputs, Model, Run
from torch import Tensor, nn

import fxcompress
from fxcompress.demo_inputs import crops, load_model, load_photos
from fxcompress.passes.quantization import Quantize

_LITE0 = "efficientnet_lite0"
_MODELS = (_LITE0, "resnet50", "mobilenet_v2", "vit_b_16")
_PEERS = ("eager", "frozen", "torchao", "openvino")
_FOLD = ("remove-identity", "fold-batch-norm")


def _pruned(ratio: float, step: int = 16) -> tuple[str, ...]:
    prune = f"prune-channels:ratio={ratio},measure=macs,reconstruct=True,round_to={step}"
    return ("remove-identity", prune, "fold-batch-norm")


STACKS: dict[str, tuple[str, ...]] = {
    "int8": _FOLD,
    "prune 5% of MACs, int8": _pruned(0.05, 8),
    "ALDS 10%, int8": (*_FOLD, "alds:ratio=0.1,error=activation"),
}
"""What comes before the integers, by name."""
_STRONG = {
    "prune 40% of MACs, int8": ("remove-identity", "prune-channels:ratio=0.4,measure=macs,round_to=16", _FOLD[1])
}
_QUANTIZE, _ADAPTIVE = Quantize(), Quantize(rounding="adaptive")


class Stacked(Workbench):
    """A workbench whose own variants are made of a compressed graph.

    Args:
        run: the model.
        threads: for each runtime.
        passes: before quantisation.
        pass_: which quantises.

    Attributes:
        for_openvino: the quantised graph with both addends rounded.
    """

    def __init__(self, run: Run, threads: int, passes: Sequence[str], pass_: Quantize) -> None:
        super().__init__(run, 1, threads)
        data = [(x,) for x in self.calibration]
        self.compressed = fxcompress.compile(self.module, list(passes), (self.x,), calibration=data)
        self.reference, self.for_openvino = (
            fxcompress.compile(
                self.compressed, [dataclasses.replace(pass_, round_addends=both)], (self.x,), calibration=data
            )
            for both in (False, True)
        )

    def in_openvino(self) -> Call:
        """By way of ONNX."""
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            fxcompress.export_onnx(self.for_openvino, path, self.x)
            model = openvino.convert_model(path)
        model.reshape(list(self.x.shape))
        return self.openvino_call(model)

    def calls(self) -> dict[str, Callable[[], Call]]:
        """Its ways to run, by name, to be made in this order."""
        return {
            "lowered": lambda: self.lowered,
            "in OpenVINO": self.in_openvino,
            "compiled": lambda: VARIANTS["ours-compiled"](self),
        }


class _Called(nn.Module):
    """What another runtime computes, one sample at a time."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Of shape ``(batch, classes)``."""
        return torch.cat([torch.as_tensor(self.call(sample)).clone() for sample in x.split(1)])


def _draw(module: nn.Module, generator: torch.Generator, batch: int) -> Inputs:
    seed = int(torch.randint(1 << 30, (), generator=generator))
    return (crops(list(load_photos().values()), batch, seed=seed),), {}


class _Trained(Model):
    """A model whose weights are what they are."""

    def run(self, seed: int = 0) -> Run:
        return Run(self, self.build().eval())


def _models(names: Sequence[str]) -> list[Model]:
    return [_Trained(n, "demo", load_model, _draw) if n == _LITE0 else int8.models([n])[0] for n in names]


def _agreement(gm: nn.Module, held_out: photos.HeldOut) -> dict[str, Any]:
    return photos.compared(copy.deepcopy(gm), held_out)


def measure(model: Model, stage: Callable[[str], None], *, threads: int, rounds: int) -> dict[str, Any]:
    """Make everything ready and time it in turns."""
    torch.set_num_threads(threads)
    stage("the model itself")
    run = model.run()
    bench = Workbench(run, 1, threads)
    trained = model.name == _LITE0
    record: dict[str, Any] = {"stacks": {}, "failed": {}}
    stacks: dict[str, Stacked] = {}
    held_out = photos.draw(run.module, 1, 512)[1] if trained else None
    for name, passes in (
        STACKS if trained else {"int8": _FOLD, "prune 5% of MACs, int8": _pruned(0.05), **_STRONG}
    ).items():
        stage(f"compress: {name}")
        stacks[name] = Stacked(run, threads, passes, _ADAPTIVE if trained else _QUANTIZE)
        found = stacks[name]
        totals = fxcompress.report(found.reference).total
        record["stacks"][name] = {
            "passes": [*passes, str(_ADAPTIVE if trained else _QUANTIZE)],
            "macs": totals.macs_after / totals.macs_before if totals.macs_before and totals.macs_after else None,
            "bytes": totals.bytes_after / totals.bytes_before,
            "error": int8.off(bench.expected, found.outputs(found.reference))["output"],
            "agreement": _agreement(found.reference, held_out) if held_out else None,
            "in OpenVINO": {
                "error": int8.off(bench.expected, found.outputs(found.for_openvino))["output"],
                "agreement": _agreement(found.for_openvino, held_out) if held_out else None,
            },
        }
    calls: dict[str, Call] = {}
    ready: list[tuple[str, Callable[[], Call]]] = [(n, lambda n=n: VARIANTS[n](bench)) for n in ("eager", "openvino")]
    for way in ("lowered", "in OpenVINO"):
        ready += [(f"{name}: {way}", stack.calls()[way]) for name, stack in stacks.items()]
    ready += [(n, lambda n=n: VARIANTS[n](bench)) for n in ("torchao", "frozen")]
    ready += [(f"{name}: compiled", stack.calls()["compiled"]) for name, stack in stacks.items()]
    for name, make in ready:
        stage(f"prepare {name}")
        try:
            calls[name] = make()
        except Exception as error:  # a peer's
            record["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    if held_out and "openvino" in calls:
        record["openvino"] = photos.compared(_Called(calls["openvino"]), held_out)
    stage("time")
    record["latency"] = int8.in_turns(calls, bench.x, rounds)
    return record


def _text(records: Sequence[dict[str, Any]]) -> str:
    parts = []
    for record in records:
        if "error" in record:
            parts.append(f"{record['model']}: {record['error']}")
            continue
        latency = {name: found["wall"]["median"] for name, found in record["latency"].items()}
        openvino = latency["openvino"]
        peers = [name for name in _PEERS if name in latency]
        rows = [[f"{n}, uncompressed", _ms(latency[n]), _ratio(openvino, latency[n]), "", "", ""] for n in peers]
        if "openvino" in record:
            rows[peers.index("openvino")][-1] = _same(record["openvino"])
        for name, stack in record["stacks"].items():
            sizes = [f"{stack['macs']:.0%}", f"{stack['bytes']:.0%}"]
            for way in ("lowered", "compiled", "in OpenVINO"):
                if (key := f"{name}: {way}") in latency:
                    of = stack.get(way, stack)
                    same = f"{_same(of['agreement']) if of['agreement'] else '-'} ({of['error']:.2f})"
                    rows.append([f"ours, {key}", _ms(latency[key]), _ratio(openvino, latency[key]), *sizes, same])
        headers = [record["model"], "latency", "OpenVINO int8 / this", "MACs", "bytes", "same class (error)"]
        parts.append(publish.markdown(rows, headers))
        parts += [f"failed: {name}: {reason}" for name, reason in record["failed"].items()]
    note = (
        "Batch 1, one thread, wall clock, medians of calls in turns. Same class: as the uncompressed network, on 512\n"
        "held-out crops of photos that calibration saw other crops of / of other photos; error: of the outputs,\n"
        "relative norm. Weights of ResNet-50, MobileNetV2 and ViT-B/16 are random."
    )
    return "\n\n".join([*parts, note])


def _same(found: dict[str, Any]) -> str:
    return " / ".join(f"{found[kind]['same']:.1%}" for kind in ("seen", "unseen"))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _ratio(of: float, to: float) -> str:
    return f"{of / to:.2f}"


def main() -> None:
    """Measure, print and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(_MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    limits = isolated.Limits(seconds=1500, memory=20 << 30)

    def one(model: Model, stage: Callable[[str], None]) -> dict[str, Any]:
        return measure(model, stage, threads=arguments.threads, rounds=arguments.rounds)

    records = []
    for record in isolated.sweep(_models(arguments.models), one, limits):
        records.append(record)
        publish.publish("headline", _text(records), records, write=not arguments.dry_run)


if __name__ == "__main__":
    main()
