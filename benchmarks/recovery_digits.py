"""What training with a teacher brings back after pruning and factorising, on small networks and real digits.

A ResNet-20 trained on 1,200 of the 1,797 handwritten digits of scikit-learn teaches students that were made of it:
channels pruned to 50 and 75 percent fewer parameters, and ALDS to 75 and 90 percent fewer. All train equally many
steps on the same batches (images shifted by up to two pixels, cross-entropy with labels) with ``fxcompress.recover``:
by themselves, with soft targets, with attention transfer or factor transfer on top. And gradual against one-shot
compression at the same total of steps, by themselves. Accuracy is that on the other 597 digits, in percent: the mean
over seeds and the standard deviation; in the first column that before training.

Run ``python benchmarks/recovery_digits.py [--seeds 3] [--epochs 25] [--steps 150] [--resume]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from typing import Any

import publish
import torch
import torch.nn.functional as F
from alds_trained import accuracy, digits, resnet20, train
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import TraceWarning
from fxcompress.pass_base import Pass
from fxcompress.passes.distillation import AttentionTransfer, DistillationLoss, FactorTransfer, SoftTargets
from fxcompress.passes.low_rank import AldsPlus
from fxcompress.passes.pruning import PruneChannels
from fxcompress.recovery import Gradual

_BATCH, _RATE, _GRADUAL = 64, 0.02, 4
_TAPS = [("5", "5"), ("8", "8"), ("11", "11")]
_NAME = "recovery_digits"


def _prune(ratio: float) -> Pass:
    return PruneChannels(ratio, measure="params", scope="global")


_STUDENTS = {
    "pruned 50%": (_prune, 0.5),
    "pruned 75%": (_prune, 0.75),
    "ALDS 75%": (AldsPlus, 0.75),
    "ALDS 90%": (AldsPlus, 0.9),
}


def teachings() -> dict[str, list[DistillationLoss]]:
    """What the teacher says, by name."""
    soft = SoftTargets(temperature=4.0)
    return {
        "labels alone": [],
        "soft targets": [soft],
        "+ attention": [soft, AttentionTransfer(weight=10.0)],
        "+ factors": [soft, FactorTransfer(weight=0.1)],
    }


def batches(data: tuple[Tensor, ...], steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Shifted images and their labels, ``steps`` times."""
    images, labels = data[:2]
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < steps:
        for index in torch.randperm(len(images), generator=generator).split(_BATCH):
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            found.append((images[index].roll((dy, dx), (2, 3)), labels[index]))
    return found[:steps]


def _recovered(gm: Any, steps: int, data: tuple[Tensor, ...], seed: int, **options: Any) -> Any:
    return fxcompress.recover(
        gm, batches(data, steps, seed), loss_fn=F.cross_entropy, lr=_RATE, max_norm=5.0, seed=seed, **options
    )


def measure(seed: int, epochs: int, steps: int) -> list[dict[str, Any]]:
    """One teacher and all its students."""
    data = digits()
    torch.manual_seed(seed)
    teacher: nn.Module = resnet20()
    train(teacher, data, epochs, epochs, seed)
    graph = fxcompress.trace(teacher, data[0][:2])
    start = time.perf_counter()
    records: list[dict[str, Any]] = []
    for name, (factory, ratio) in _STUDENTS.items():
        student = fxcompress.compile(graph, [factory(ratio)], data[0][:2])
        record = {"student": name, "seed": seed, "teacher": accuracy(teacher, data), "before": accuracy(student, data)}
        for kind, losses in teachings().items():
            options = {"teacher": teacher, "losses": losses, "taps": _TAPS} if losses else {}
            record[kind] = accuracy(_recovered(student, steps, data, seed, **options), data)
        gradual = Gradual(factory, 0.0, ratio, _GRADUAL)
        record["gradual"] = accuracy(_recovered(graph, steps, data, seed, gradual=gradual), data)
        records.append(record)
        print(f"{time.perf_counter() - start:.0f} s", record, flush=True)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """A row for each student."""
    rows = []
    columns = ["before", *teachings(), "gradual"]
    for name in _STUDENTS:
        mine = [record for record in records if record["student"] == name]
        if mine:
            rows.append([name, *(_cell([100 * record[column] for record in mine]) for column in columns)])
    found = {record["seed"]: 100 * record["teacher"] for record in records}
    headers = ["student", "before", *teachings(), f"labels alone, gradual in {_GRADUAL}"]
    return publish.markdown(rows, headers) + f"\n\nThe teachers: {_cell(list(found.values()))}; {len(found)} seeds."


def _cell(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--resume", action="store_true", help="keep the seeds that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TraceWarning)
    path = publish.RESULTS / f"{_NAME}.json"
    records = json.loads(path.read_text())["results"] if arguments.resume and path.exists() else []
    for seed in range(arguments.seeds):
        if not any(record["seed"] == seed for record in records):
            records += measure(seed, arguments.epochs, arguments.steps)
            publish.publish(_NAME, table(records), records)


if __name__ == "__main__":
    main()
