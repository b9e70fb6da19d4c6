"""Recovering with a teacher: what ``attach-distillation`` makes, trained and taken apart again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import UsageError
from fxcompress.passes.distillation import AttachDistillation, DistillationLoss, FactorTransfer, Hint, SoftTargets
from fxcompress.passes.pruning import PruneChannels
from fxcompress.recovery import Gradual


class Net(nn.Module):
    """Two convolutions with batch norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def nets() -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    teacher = Net(16).eval()
    with torch.no_grad():
        teacher.head.weight.mul_(20)
    student = fxcompress.compile(teacher, ["prune-channels:ratio=0.5"], torch.randn(2, 3, 8, 8))
    return student, teacher


def batches(count: int = 12, labels: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]
    return [(x, torch.randint(4, (8,), generator=generator)) for x in inputs] if labels else inputs


def distance(student: nn.Module, teacher: nn.Module) -> float:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float(SoftTargets(1.0)(student(x), teacher(x)))


LOSSES: list[list[DistillationLoss] | None] = [None, [SoftTargets(2.0), FactorTransfer(weight=0.1), Hint()]]


@pytest.mark.parametrize("losses", LOSSES)
def test_it_learns_from_a_teacher_without_labels(losses: Any) -> None:
    student, teacher = nets()
    state, code = copy.deepcopy(student.state_dict()), student.code
    taps = None if losses is None else [("a", "a")]
    found = fxcompress.recover(student, batches(), teacher=teacher, losses=losses, taps=taps, epochs=8, lr=0.05)
    assert distance(found, teacher) < 0.7 * distance(student, teacher)
    assert found.code == code
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    assert [r.name for r in fxcompress.report(found).passes] == ["prune-channels"]


def test_labels_the_callers_loss_and_several_teachers() -> None:
    student, teacher = nets()
    rows: list[Any] = []
    found = fxcompress.recover(
        student, batches(labels=True), teacher=[teacher, copy.deepcopy(teacher)], losses=[SoftTargets(alpha=0.5)],
        loss_fn=F.cross_entropy, evaluate=lambda gm: rows.append(distance(gm, teacher)) or 0.0, epochs=2,
    )  # fmt: skip
    assert len(rows) == 2
    assert not hasattr(found, "distillation")
    with pytest.raises(UsageError, match="no labels"):
        fxcompress.recover(student, batches(), teacher=teacher, losses=[SoftTargets(alpha=0.5)])


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_modes(batch_norm: str) -> None:
    student, teacher = nets()
    fused = fxcompress.compile(
        student, [AttachDistillation(teacher, [FactorTransfer()], taps=[("a", "a")])], batches()[0]
    )
    before = copy.deepcopy(fused.state_dict())
    found = fxcompress.recover(fused, batches(), batch_norm=batch_norm)
    moved = {k for k, v in found.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(".teacher." in key for key in moved)
    assert ("norm.running_mean" in moved) is (batch_norm == "train")
    assert any(".terms." in key and key.endswith("running_mean") for key in moved), "what losses learn is trained"
    assert any(".terms." in key and key.endswith("weight") for key in moved)
    assert not found.training


def test_gradually_with_a_teacher_and_after_a_break(tmp_path: Path) -> None:
    _, teacher = nets()
    graph = fxcompress.compile(teacher, [], batches()[0])
    gradual = Gradual(lambda ratio: PruneChannels(ratio), 0.0, 0.5, 2)
    options: dict[str, Any] = {"teacher": teacher, "losses": [SoftTargets(), Hint()], "taps": [("a", "a")]}
    whole = fxcompress.recover(graph, batches(), gradual=gradual, **options)
    assert whole.get_submodule("a").out_channels == 8

    class Stopped(Exception):
        pass

    def stops(event: Any) -> None:
        if event.stage == "recover" and event.done == 9:
            raise Stopped

    again = {**options, "gradual": gradual, "checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        fxcompress.recover(graph, batches(), progress=stops, **again)
    found = fxcompress.recover(graph, batches(), **again)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in found.state_dict().items())
