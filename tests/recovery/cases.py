"""Trainings that are run in one process and in several, and what they end with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fxcompress
from fxcompress.errors import RecoveryError
from fxcompress.passes.distillation import Hint
from fxcompress.passes.pruning import PruneChannels
from fxcompress.recovery import Gradual

State = dict[str, Tensor]


def network(kind: str = "plain") -> Any:
    """A recorded convolutional network: with layer norm, batch norm or dropout."""
    torch.manual_seed(0)
    norms: dict[str, nn.Module] = {
        "plain": nn.GroupNorm(2, 8),
        "norm": nn.BatchNorm2d(8),
        "average": nn.BatchNorm2d(8, momentum=None, affine=False),
        "dropout": nn.Sequential(nn.GroupNorm(2, 8), nn.Dropout(0.3)),
    }
    layers = [nn.Conv2d(3, 8, 3), norms[kind], nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 5)).eval()
    return fxcompress.trace(model, torch.randn(2, 3, 8, 8))


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels that have to do with each other."""
    torch.manual_seed(1)
    images = [torch.randn(size, 3, 8, 8) for size in sizes]
    return [(x, x.mean((2, 3)).argmax(1)) for x in images]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise that is drawn anew each time."""

    def __init__(self, count: int = 22) -> None:
        ((self.images, self.labels),) = batches(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + 0.1 * torch.randn(3, 8, 8), self.labels[index]


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without indices or a length."""

    def __iter__(self) -> Any:
        dataset = Augmented()
        return (dataset[i] for i in torch.randperm(len(dataset)).tolist())


def loader(workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(Augmented(), batch_size=5, shuffle=True, num_workers=workers)


def state(gm: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in gm.state_dict().items()}


train = functools.partial(fxcompress.recover, loss_fn=F.cross_entropy, lr=0.05)


def uneven() -> State:
    """Batches that cannot be divided, one of them smaller than the number of processes."""
    return state(train(network(), batches(7, 1, 8, 3, 6), steps=20))


def loaded() -> State:
    """Only a share of each batch is loaded, and each sample has its own noise."""
    return state(train(network(), loader(), steps=20, optimizer="adamw", lr=0.003, max_norm=0.5))


def streamed() -> State:
    return state(train(network(), DataLoader(Endless(), batch_size=5), steps=20))


def norms() -> State:
    return state(train(network("norm"), batches(7, 1, 8, 3), steps=20))


def averaged() -> State:
    return state(train(network("average"), batches(7, 1, 8, 3), steps=20))


def frozen() -> State:
    return state(train(network("norm"), batches(7, 1, 8, 3), steps=20, batch_norm="frozen"))


def distilled() -> State:
    """The losses look at an inner layer alone, so the last one gets no gradient."""
    options: dict[str, Any] = {"teacher": network("norm"), "losses": [Hint()], "taps": [("0", "0")]}
    return state(fxcompress.recover(network(), [x for x, _ in batches(7, 3, 8)], steps=20, lr=0.05, **options))


def gradual() -> State:
    plan = Gradual(lambda ratio: PruneChannels(ratio=ratio), 0.0, 0.5, 2)
    return state(train(network(), batches(7, 5, 8), steps=20, gradual=plan))


def calibrated() -> State:
    """The main process compresses alone, and must not wait for what the others saw of the data."""
    data = batches(7, 5, 8)
    factory = functools.partial(PruneChannels, importance="activation")
    plan = Gradual(factory, 0.0, 0.5, 2, calibration=[x for x, _ in data])
    return state(train(network(), data, steps=20, gradual=plan))


def not_a_number() -> State:
    """Only the last process sees the bad sample, and all must stop."""
    data = batches(8, 8, 8)
    data[2][0][-1] = float("nan")
    with pytest.raises(RecoveryError, match="step 3: the term 'cross_entropy' is nan"):
        train(network(), data)
    return {}


SAME: dict[str, Callable[[], State]] = {
    f.__name__: f
    for f in (uneven, loaded, streamed, norms, averaged, frozen, distilled, gradual, calibrated, not_a_number)
}


class Stop(Exception):
    """Stands for whatever ends a process before its time."""


def interrupted(folder: str, after: int | None, **options: Any) -> Any:
    """Train with checkpoints; ``after`` so many steps of this process the loss raises."""
    calls = 0

    def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if after is not None and calls > after:
            raise Stop
        return F.cross_entropy(output, labels)

    given = {"gm": network(), "batches": loader(), "steps": 20, "checkpoint_every": 3, "lr": 0.05, **options}
    return fxcompress.recover(given.pop("gm"), given.pop("batches"), loss_fn=cross_entropy, checkpoint=folder, **given)
