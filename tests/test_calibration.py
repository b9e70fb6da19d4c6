"""Calibration data: what may be given, and one run that leaves nothing behind."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress import Example, Observation, PassError, UsageError
from fxcompress.calibration import as_batches, collect


class Sum:
    """An observer that counts and adds up."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def update(self, value: Tensor) -> None:
        assert not torch.is_grad_enabled()
        self.count += 1
        self.total += float(value.sum())

    def result(self) -> tuple[int, float]:
        return self.count, self.total


class Failing(Sum):
    def update(self, value: Tensor) -> None:
        raise RuntimeError("no sums today")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return self.drop(self.norm(x.add_(1.0))) * scale


@pytest.fixture
def gm() -> fx.GraphModule:
    return fx.symbolic_trace(Two())


def placeholder(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "placeholder")


def watch(gm: fx.GraphModule, key: str = "sum", factory: Any = Sum) -> Observation:
    return Observation(placeholder(gm), key, factory)


ONE = torch.ones(4, 2)
Named = collections.namedtuple("Named", "x scale")


@pytest.mark.parametrize(
    "batch",
    [
        ONE,
        (ONE,),
        [ONE],
        (ONE, 2.0),
        Named(ONE, 2.0),
        {"x": ONE},
        {"x": ONE, "scale": 2.0},
        collections.UserDict({"x": ONE}),
        Example((ONE,), {"scale": 3.0}),
    ],
)
def test_kinds_of_batches(gm: fx.GraphModule, batch: Any) -> None:
    assert collect(gm, as_batches([batch, batch]), [watch(gm)]) == {(placeholder(gm), "sum"): (2, 16.0)}
    assert torch.equal(ONE, torch.ones(4, 2)), "the in-place addition reached the caller's data"


def test_a_data_loader_of_inputs(gm: fx.GraphModule) -> None:
    loader = DataLoader(torch.ones(6, 2), batch_size=2)
    batches = as_batches(loader)
    assert batches.count() == 3
    for _ in range(2):
        assert collect(gm, batches, [watch(gm)])[placeholder(gm), "sum"] == (3, 12.0)


def test_labels_are_not_taken_for_inputs() -> None:
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    loader = DataLoader(TensorDataset(torch.ones(6, 2), torch.zeros(6)), batch_size=3)
    with pytest.raises(UsageError) as caught:
        collect(gm, as_batches(loader), [watch(gm)])
    assert "batch 0" in str(caught.value)
    assert "2 positional items (Tensor(3, 2), Tensor(3,)) but the model takes 1 (input)" in str(caught.value)
    assert "[images for images, labels in loader]" in str(caught.value)


def generator() -> Iterator[Tensor]:
    yield ONE
    yield ONE


def test_a_generator_is_kept_only_if_asked(gm: fx.GraphModule) -> None:
    kept = as_batches(generator())
    assert [len(list(kept)), len(list(kept))] == [2, 2]
    streamed = as_batches(generator(), keep=False)
    assert streamed.count() is None
    assert len(list(streamed)) == 2
    with pytest.raises(UsageError, match="generator and was read already"):
        list(streamed)


def test_as_batches_of_batches_is_itself() -> None:
    batches = as_batches([ONE])
    assert as_batches(batches) is batches


@pytest.mark.parametrize("data", [ONE, {"x": ONE}, 3, None, Example((ONE,)), "data"])
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(UsageError, match="iterable of batches"):
        as_batches(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([ONE, "a"], "batch 1 of the calibration data is a str"),
        ([], "no batches"),
        ([{"y": ONE}], "batch 0 of the calibration data: the inputs do not fit"),
        ([()], "batch 0 of the calibration data: the inputs do not fit"),
        ([torch.ones(4, 3)], r"failed on batch 0 of the calibration data \(Tensor\(4, 3\)\): RuntimeError"),
    ],
)
def test_bad_batches(gm: fx.GraphModule, data: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        collect(gm, as_batches(data), [watch(gm)])


def test_a_failing_observer_is_named(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"observer 'bad' of node 'x' .* Tensor\(4, 2\): RuntimeError: no sums today"):
        collect(gm, as_batches([ONE]), [watch(gm, "bad", Failing)])


def test_a_node_of_another_graph(gm: fx.GraphModule) -> None:
    with pytest.raises(UsageError, match="another graph"):
        collect(gm, as_batches([ONE]), [watch(fx.symbolic_trace(Two()))])


def test_one_run_for_all_and_nothing_left_behind(gm: fx.GraphModule) -> None:
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    gm.get_submodule("norm").register_forward_hook(counted)
    made: list[Sum] = []

    def factory() -> Sum:
        made.append(Sum())
        return made[-1]

    output = next(n for n in gm.graph.nodes if n.target == "norm")
    wishes = [
        watch(gm, "a", factory),
        watch(gm, "b", factory),
        watch(gm, "a", factory),
        Observation(output, "a", factory),
    ]
    state = {k: v.clone() for k, v in gm.state_dict().items()}
    random = torch.get_rng_state()
    progress: list[tuple[int, int | None]] = []
    result = collect(gm, as_batches([ONE, ONE, ONE]), wishes, lambda n, of: progress.append((n, of)))
    assert (runs, len(made)) == (3, 3)
    assert set(result) == {(placeholder(gm), "a"), (placeholder(gm), "b"), (output, "a")}
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(torch.get_rng_state(), random)
    assert gm.training
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())


def test_batches_go_to_the_device() -> None:
    batch = next(iter(as_batches([{"x": [ONE]}], device=torch.device("meta"))))
    assert batch.kwargs["x"][0].is_meta
    assert not ONE.is_meta
