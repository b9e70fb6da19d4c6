"""The training loop in one process: what it gives back, what it refuses, what it writes."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import math
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.errors import RecoveryError, UsageError
from fxcompress.passes.distillation import AttachDistillation, Hint, SoftTargets
from fxcompress.passes.pruning import PruneChannels
from fxcompress.progress import Event
from fxcompress.recovery import Gradual, Rewound
from tests.recovery.cases import Endless, Stop, batches, interrupted, loader, network, state, train


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def accuracy(gm: nn.Module) -> float:
    assert not any(module.training for module in gm.modules())
    ((x, y),) = batches(64)
    return float((gm(x).argmax(1) == y).float().mean())


# ------------------------------------------------------------------------------------------------------ what it does
def test_against_a_loop_by_hand() -> None:
    gm, data = network("norm"), batches(6, 4, 8)
    wanted = copy.deepcopy(gm).train()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 6)
        optimizer.zero_grad()
        x, y = data[step % 3]
        F.cross_entropy(wanted(x), y).backward()
        nn.utils.clip_grad_norm_(wanted.parameters(), 0.5)
        optimizer.step()
    found = fxcompress.recover(gm, data, loss_fn=F.cross_entropy, epochs=2, lr=0.1, schedule="linear", max_norm=0.5)
    assert same(state(found), state(wanted))


def test_it_learns() -> None:
    gm = network("dropout")
    assert accuracy(train(gm, batches(32, 32, 32, 32), epochs=60, lr=0.1)) > accuracy(gm) + 0.3


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_things_stay_as_they_are(training: bool) -> None:
    gm = network("norm").train(training)
    gm.get_submodule("0").weight.requires_grad_(False)
    data = batches(4, 4)
    before, inputs = state(gm), [x.clone() for x, _ in data]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    result = train(gm, data, epochs=2)
    drawn = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(expected[0], drawn[0])
    assert expected[1:] == drawn[1:]
    assert same(state(gm), before)
    assert all(torch.equal(x, old) for (x, _), old in zip(data, inputs, strict=True))
    assert all(p.grad is None for p in (*gm.parameters(), *result.parameters()))
    assert all(module.training is training for module in result.modules())
    after = state(result)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not result.get_submodule("0").weight.requires_grad
    assert not torch.equal(after["6.weight"], before["6.weight"])
    assert [n.format_node() for n in result.graph.nodes] == [n.format_node() for n in gm.graph.nodes]


def test_the_report_stays() -> None:
    small = fxcompress.compile(network("norm"), ["fold-batch-norm"], torch.randn(2, 3, 8, 8))
    assert fxcompress.report(train(small, batches(4))) == fxcompress.report(small)
    with pytest.raises(UsageError, match="has no report"):
        fxcompress.report(
            train(copy.deepcopy(fx.symbolic_trace(nn.Linear(3, 5))), [(torch.ones(2, 3), torch.zeros(2).long())])
        )


def test_runs_are_repeatable_and_seeds_differ() -> None:
    first, second, other = (state(train(network("dropout"), loader(), epochs=2, seed=s)) for s in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


def test_batch_norm_frozen() -> None:
    gm = network("norm")
    moved, frozen = (state(train(gm, batches(4, 4), batch_norm=mode)) for mode in ("train", "frozen"))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(frozen[name], state(gm)[name])
        assert not torch.equal(moved[name], state(gm)[name])
    assert not torch.equal(frozen["1.weight"], state(gm)["1.weight"])


def test_bfloat16() -> None:
    full, half = (train(network(), batches(8, 8), precision=p).state_dict() for p in ("fp32", "bf16"))
    assert all(t.dtype == torch.float32 for t in half.values())
    assert not same(full, half)
    assert all(torch.allclose(full[k], half[k], atol=0.02) for k in full)


def test_optimizers_and_schedules_of_the_caller() -> None:
    made: list[Any] = []

    def adagrad(parameters: Any) -> Any:
        groups = [{"params": parameters[:2], "lr": 0.5}, {"params": parameters[2:]}]
        made.append(torch.optim.Adagrad(groups, lr=0.1))
        return made[-1]

    asked: list[tuple[int, int]] = []

    def halved(step: int, total: int) -> float:
        asked.append((step, total))
        return 0.5

    fxcompress.recover(network(), batches(4, 4), loss_fn=F.cross_entropy, optimizer=adagrad, schedule=halved)
    assert asked == [(0, 2), (1, 2)]
    assert [group["lr"] for group in made[0].param_groups] == [0.25, 0.05]


def test_modules_as_losses_are_trained_on_a_copy() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(output * self.scale, labels)

    loss = Scaled()
    train(network(), batches(4), loss_fn=loss)
    assert loss.scale.item() == 1


# ------------------------------------------------------------------------------------------------------ distillation
def test_distillation_is_attached_and_detached() -> None:
    student, teacher = network("dropout"), network("norm")
    before = state(teacher)
    images = [x for x, _ in batches(16, 16)]
    found = fxcompress.recover(student, images, teacher=teacher, epochs=40, lr=0.05)
    assert same(state(teacher), before)
    assert state(found).keys() == state(student).keys()
    error = [SoftTargets()(gm.eval()(images[0]), teacher(images[0])).item() for gm in (student, found)]
    assert error[1] < 0.5 * error[0]


def test_labels_for_distillation_and_for_the_loss(tmp_path: Path) -> None:
    log, losses = tmp_path / "log.csv", [SoftTargets(alpha=0.0), Hint()]
    options: dict[str, Any] = {"teacher": network(), "losses": losses, "taps": [("0", "0")]}
    train(network(), batches(8), log=log, **options)
    with pytest.raises(UsageError, match="no labels, which a distillation loss wants"):
        fxcompress.recover(network(), [batches(8)[0][0]], **options)
    (row,) = csv.DictReader(log.open())
    names = ("soft_targets", "hint", "cross_entropy")
    assert float(row["loss"]) == pytest.approx(sum(float(row[k]) for k in names), rel=1e-6)
    assert float(row["soft_targets"]) == pytest.approx(float(row["cross_entropy"]))


def test_a_fused_graph_is_trained_as_it_is() -> None:
    images = [x for x, _ in batches(8, 8)]
    attach = AttachDistillation(nn.Sequential(nn.Conv2d(3, 9, 3)), [Hint()], [("0", "0")])
    graph = fxcompress.compile(network(), [attach], images[0])
    found = fxcompress.recover(graph, images, lr=0.1, evaluate=lambda gm: float(gm(images[0]).shape[0]))
    before, after = state(graph), state(found)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    learned = {"distillation.terms.hint.loss.regressor.weight", "distillation.terms.hint.loss.regressor.bias"}
    assert changed == {"0.weight", "0.bias", *learned}
    with pytest.raises(UsageError, match="carries distillation losses already, so teacher cannot be given"):
        fxcompress.recover(graph, images, teacher=network())


# ----------------------------------------------------------------------------------------------------------- gradual
def halving(ratio: float) -> PruneChannels:
    return PruneChannels(ratio=ratio)


def test_gradual_pruning(tmp_path: Path) -> None:
    wide = fxcompress.trace(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    log = tmp_path / "log.csv"
    plan = Gradual(halving, 0.0, 0.875, 3, "exponential")
    found = train(wide, batches(8, 8), steps=10, gradual=plan, log=log, schedule="linear", lr=1.0)
    assert found.get_submodule("0").weight.shape[0] == 4
    assert [p.name for p in fxcompress.report(found).passes] == ["prune-channels"] * 3
    rows = list(csv.DictReader(log.open()))
    assert [row["stage"] for row in rows] == list("0001112222")
    assert [round(float(row["lr"]), 2) for row in rows] == [1, 0.67, 0.33, 1, 0.67, 0.33, 1, 0.75, 0.5, 0.25]
    assert [row["epoch"] for row in rows] == list("0011223344")


# ----------------------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": None}, "nothing to minimise; pass `teacher`"),
        ({"losses": ["soft"]}, "pass `teacher` too"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw"),
        ({"optimizer": lambda parameters: None, "lr": None}, "it made a NoneType"),
        ({"optimizer": torch.optim.SGD}, "`lr` is for optimizers given by name"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"schedule": "cosinus"}, "a schedule is one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"batch_norm": "eval"}, "batch_norm must be one of"),
        ({"evaluate": 3}, "`evaluate` is a function"),
        ({"gradual": 3}, "`gradual` is an fxcompress.Gradual"),
        ({"gradual": Gradual(halving, 0.0, 0.5, 9)}, "2 steps are too few for 9 compressions"),
        ({"loss_fn": lambda output, labels: output}, r"one number, the mean over the batch; it gave shape \(4, 5\)"),
        ({"progress": 3}, "`progress` is"),
    ],
)
def test_wrong_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(network(), batches(4, 4), **options)


def test_wrong_data() -> None:
    images = [x for x, _ in batches(4)]
    for data, options, message in (
        (images, {}, "batch 0 has no labels, which `loss_fn` wants"),
        ([], {}, "no batches in it"),
        (iter([]), {"schedule": "constant"}, "no batches in it"),
        ((b for b in batches(4)), {"epochs": 2}, "a generator, which can be read once only, not 2 epochs long"),
        ((b for b in batches(4)), {"steps": 2}, "a generator, which can be read once only, and its end"),
        ((b for b in batches(4)), {}, "does not say how many batches it has"),
        (images[0], {}, "put a single batch into a list"),
    ):
        with pytest.raises(UsageError, match=message):
            train(network(), data, **options)
    with pytest.raises(UsageError, match="not Linear"):
        train(nn.Linear(3, 5), batches(4))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is nothing to train"):
        train(network().requires_grad_(False), batches(4))


def test_data_without_a_length() -> None:
    data = batches(4, 4, 4)
    wanted = state(train(network(), data, schedule="constant"))
    assert same(state(train(network(), iter(data), schedule="constant")), wanted)
    assert same(state(train(network(), iter(data), steps=3, schedule="constant")), wanted)
    stream: Any = torch.utils.data.DataLoader(Endless(), batch_size=8)
    assert same(*(state(train(network(), stream, steps=7)) for _ in range(2)))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_float16_wants_a_gpu() -> None:
    with pytest.raises(UsageError, match="precision='fp16' needs a GPU, found cpu"):
        train(network(), batches(4), precision="fp16")
    train(network(), batches(4))  # and what was tried leaves nothing behind


def test_an_accelerator_of_the_callers() -> None:
    mine = Accelerator(cpu=True)
    try:
        train(network(), batches(4))
        assert AcceleratorState._shared_state
        with pytest.raises(UsageError, match="accelerate cannot train with precision='bf16' here"):
            train(network(), batches(4), precision="bf16")
    finally:
        del mine
        AcceleratorState._reset_state()
        PartialState._reset_state()


def test_accelerate_is_imported_by_the_call_alone() -> None:
    code = (
        "import sys, torch, fxcompress; assert 'accelerate' not in sys.modules; sys.modules['accelerate'] = None\n"
        "gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))\n"
        "fxcompress.recover(gm, [], loss_fn=torch.nn.functional.mse_loss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UsageError: recover needs accelerate: pip install 'fxcompress[train]'" in done.stderr


# ------------------------------------------------------------------------------------------------- what goes wrong
def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    data = batches(4, 4, 4, 4)
    data[2][0][1] = math.nan
    with pytest.raises(RecoveryError, match="step 3: the term 'cross_entropy' is nan"):
        train(network(), data, checkpoint=tmp_path, checkpoint_every=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000000001", "step-0000000002"]


def test_a_gradient_that_is_no_number() -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output.square().sum(1).sub(output.detach().square().sum(1)).sqrt().mean()  # the root of 0

    with pytest.raises(RecoveryError, match=r"step 1: the gradient of '0\.weight' is not finite"):
        train(network(), batches(4), loss_fn=loss)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 3000, 6000])
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    unbroken = state(train(network(), loader(), epochs=2))
    with contextlib.ExitStack() as stack:

        def fills(event: Event) -> None:
            if event.done == 6:  # before the third checkpoint
                stack.enter_context(file_size_limit(size))

        with pytest.raises(RecoveryError, match=r"partial-step-0000000006 cannot be written"):
            train(network(), loader(), epochs=2, checkpoint=tmp_path, checkpoint_every=3, progress=fills)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003", "step-0000000005"]
    assert same(state(train(network(), loader(), epochs=2, checkpoint=tmp_path, checkpoint_every=3)), unbroken)


@pytest.mark.parametrize("after", [1, 4, 5, 8, 13])
def test_it_goes_on_with_the_same_bits(tmp_path: Path, after: int) -> None:
    log = tmp_path / "log.csv"
    options: dict[str, Any] = {"gm": network("dropout"), "optimizer": "adamw", "schedule": Rewound("cosine", 0.5)}
    wanted = state(interrupted(str(tmp_path / "unbroken"), None, **options))
    folder = str(tmp_path / "broken")
    with pytest.raises(Stop):
        interrupted(folder, after, log=log, **options)
    with log.open("a") as file:
        file.write("14,2")  # a row that a killed process did not finish
    assert same(state(interrupted(folder, None, log=log, **options)), wanted)
    assert [row["step"] for row in csv.DictReader(log.open())] == [str(i) for i in range(1, 21)]
    assert same(state(interrupted(folder, 0, log=log, **options)), wanted)  # finished: not one step more


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    train(network(), batches(4), checkpoint=tmp_path)
    for options, message in (({"lr": 0.1}, "lr was 0.05 and is 0.1"), ({"seed": 1}, "seed was 0 and is 1")):
        with pytest.raises(UsageError, match=f"a checkpoint of another run: {message}"):
            train(network(), batches(4), checkpoint=tmp_path, **options)
    with pytest.raises(UsageError, match="another run: model was"):
        train(network("norm"), batches(4), checkpoint=tmp_path)
    about = json.loads(next(tmp_path.glob("step-*/recovery.json")).read_text())
    assert about["place"]["finished"]


def test_buffers_that_are_not_in_the_state_are_in_the_checkpoint(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.lerp_(x.detach().mean(0), 0.5)
            return x - self.mean

    gm = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    gm.add_module("counting", Counting())
    (end,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(end):
        end.args = (gm.graph.call_module("counting", end.args),)
    gm.recompile()
    wanted = train(gm, batches(4, 4, 4, 4), checkpoint_every=1).get_buffer("counting.mean")
    with pytest.raises(Stop):
        interrupted(str(tmp_path), 2, gm=gm, batches=batches(4, 4, 4, 4), steps=None, checkpoint_every=1)
    found = interrupted(str(tmp_path), None, gm=gm, batches=batches(4, 4, 4, 4), steps=None, checkpoint_every=1)
    assert torch.equal(found.get_buffer("counting.mean"), wanted)


# --------------------------------------------------------------------------------------------------- what it tells
def test_progress_log_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    train(network(), batches(4, 4), epochs=2, progress=events.append, evaluate=accuracy, log=tmp_path / "log.png")
    assert [(e.stage, e.done, e.total) for e in events] == [
        *(("recover", i, 4) for i in (1, 2, 3, 4)), ("done", 1, 1)
    ]  # fmt: skip
    assert events[0].note.startswith("loss ")
    assert "agreement" in events[2].note
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(rows[0]) == ["step", "epoch", "stage", "lr", "loss", "cross_entropy", "seconds", "evaluation"]
    assert [bool(row["evaluation"]) for row in rows] == [False, True, False, True]
    assert (tmp_path / "log.png").stat().st_size > 1000
    train(network(), batches(4, 4), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "done" in captured.err
