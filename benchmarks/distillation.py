"""What one step of distillation costs when teacher, taps and losses are fused, beside the same step written by hand.

By hand: the teacher runs without gradients, hooks catch the taps, the losses are added up. Both take the same student,
teacher, losses and optimiser, eagerly and under ``torch.compile``; a step is forward, backward and an update. Steps
take turns, and a step that is not timed goes before each that is. The goal is at most 1.05 times the time, and less
compiled.

Run ``python benchmarks/distillation.py [--batch 8] [--size 96] [--rounds 15] [--clock wall]``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import clock
import publish
import torch
from models import torchvision_models
from torch import Tensor, nn

import fxcompress
from fxcompress.passes.distillation import AttachDistillation, AttentionTransfer, DistillationLoss, SoftTargets

_TAPS = [("layer2", "layer2"), ("layer3", "layer3")]
_PAIRS = {
    "resnet18 from resnet34": ("resnet18", "resnet34", _TAPS),
    "resnet18 from resnet50": ("resnet18", "resnet50", _TAPS),
    "mobilenet_v3_small from large": ("mobilenet_v3_small", "mobilenet_v3_large", [("features.3", "features.6")]),
}
Step = Callable[[], Any]


def _losses() -> list[DistillationLoss]:
    return [SoftTargets(temperature=4.0), AttentionTransfer(weight=100.0)]


class ByHand(nn.Module):
    """The usual way: hooks, and a teacher beside the student."""

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: list[tuple[str, str]]) -> None:
        super().__init__()
        self.student, self.teacher, self.soft, self.attention = student, teacher, *_losses()
        self.seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        for mine, theirs in taps:
            student.get_submodule(mine).register_forward_hook(lambda m, a, y: self.seen["student"].append(y))
            teacher.get_submodule(theirs).register_forward_hook(lambda m, a, y: self.seen["teacher"].append(y))

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        for values in self.seen.values():
            values.clear()
        with torch.no_grad():
            target = self.teacher(x)
        output = self.student(x)
        loss: Tensor = self.soft(output, target)
        for mine, theirs in zip(*self.seen.values(), strict=True):
            loss = loss + 100.0 * self.attention(mine, theirs)
        return loss


class Fused(nn.Module):
    """The loss of a fused graph."""

    def __init__(self, gm: nn.Module) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        loss: Tensor = self.gm(x)[2]
        return loss


def _step(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Step, Callable[[], float]]:
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        optimiser.zero_grad()
        loss = call(x)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step, step


def measure(name: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each kind of step, and the losses of the first ones."""
    of_student, of_teacher, taps = _PAIRS[name]
    models = torchvision_models()
    torch.manual_seed(0)
    student = getattr(models, of_student)(num_classes=10)
    teacher = getattr(models, of_teacher)(num_classes=10).eval().requires_grad_(False)
    x = torch.randn(batch, 3, size, size)
    gm = fxcompress.compile(student.eval(), [AttachDistillation(teacher, _losses(), taps)], x)
    modules = {
        "by hand": ByHand(copy.deepcopy(student).train(), teacher, taps),
        "fused": Fused(gm.train()),
    }
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for kind, module in modules.items():
        compiled = copy.deepcopy(module) if kind == "fused" else ByHand(copy.deepcopy(student).train(), teacher, taps)
        torch._dynamo.reset()
        steps[kind], once = _step(module, module, x)
        steps[f"{kind}, compiled"], once_compiled = _step(compiled, torch.compile(compiled), x)
        first |= {kind: once(), f"{kind}, compiled": once_compiled()}
    losses = list(first.values())
    if max(losses) - min(losses) > 1e-3 * max(losses):
        raise RuntimeError(f"the steps do not do the same: {first}")
    times: dict[str, list[Any]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            step()
            times[kind].append(clock.seconds(step))
    return {"name": name, "seconds": {kind: clock.medians(found) for kind, found in times.items()}, "losses": first}


def table(records: list[dict[str, Any]], by: str) -> str:
    """A row for each pair."""
    rows = []
    for record in records:
        seconds = {kind: found[by] for kind, found in record["seconds"].items()}
        row = [record["name"]]
        for suffix in ("", ", compiled"):
            hand, fused = (seconds[f"{kind}{suffix}"] for kind in ("by hand", "fused"))
            row += [f"{1e3 * hand:.0f}", f"{1e3 * fused:.0f}", f"{fused / hand:.3f}"]
        rows.append(row)
    headers = ["student", "by hand ms", "fused ms", "ratio", "by hand, compiled ms", "fused, compiled ms", "ratio"]
    return publish.markdown(rows, headers) + f"\n\nMilliseconds of a step by the {by} clock, medians."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=clock.CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [measure(name, arguments.batch, arguments.size, arguments.rounds) for name in _PAIRS]
    publish.publish("distillation", table(records, arguments.clock), records)


if __name__ == "__main__":
    main()
