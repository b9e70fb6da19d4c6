"""What is inputs and what labels, who gets which part, and that order and noise are the same each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

from fxcompress import Example
from fxcompress.errors import UsageError
from fxcompress.recovery.batches import Batch, Reader, bounds, share_of
from fxcompress.recovery.stream import Data, Stream
from tests.recovery.cases import Augmented, loader

X, Y = torch.arange(12.0).reshape(4, 3), torch.arange(4)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Named(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return x + labels


def reader(model: nn.Module, wanted: str = "`loss_fn`") -> Reader:
    return Reader(fx.symbolic_trace(model), False, wanted)


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], ((X,), Y), ({"x": X}, Y), ([X], Y), {"x": X, "labels": Y}, (Example((X,)), Y),
     Example((X,), {"labels": Y})],
)  # fmt: skip
def test_batches_with_labels(batch: Any) -> None:
    read = reader(One()).read(batch, 0)
    assert read.labels is Y
    assert [*read.inputs.args, *read.inputs.kwargs.values()][0] is X


@pytest.mark.parametrize("batch", [X, (X,), [X], {"x": X}, Example((X,))])
def test_batches_without_labels(batch: Any) -> None:
    assert reader(One(), "").read(batch, 0).labels is None
    with pytest.raises(UsageError, match="batch 3 has no labels, which `loss_fn` wants"):
        reader(One()).read(batch, 3)


def test_a_mask_is_not_taken_for_labels() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("mask", default_value=None)
    graph.output(x)
    both = Reader(fx.GraphModule(nn.Module(), graph), False, "`loss_fn`")
    with pytest.raises(UsageError, match="no labels"):
        both.read((X, Y), 0)
    assert both.read(((X,), Y), 0).labels is Y
    assert both.read((X, None, Y), 0).labels is Y


def test_labels_that_are_an_input() -> None:
    read = reader(Named()).read({"x": X, "labels": X}, 0)
    assert read.labels is X
    assert set(read.inputs.kwargs) == {"x", "labels"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [(((X,), Y, Y), "has 3 entries"), ((X, X, Y), "do not fit"), ("text", "is a str"), (({"y": X}, Y), "do not fit"),
     ((X[:0], Y[:0]), "is empty")],
)  # fmt: skip
def test_wrong_batches(batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reader(One()).read(batch, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_are_contiguous_and_whole(size: int, world: int) -> None:
    shares = [bounds(size, rank, world) for rank in range(world)]
    taken = [i for low, high, weight in shares if weight for i in range(low, high)]
    assert taken == list(range(size))
    assert sum(weight for *_, weight in shares) == pytest.approx(1)
    assert all(high - low >= 1 and high <= size for low, high, _ in shares)


def test_a_share_of_everything_that_has_a_place_for_each_sample() -> None:
    batch = Batch(Example((X, torch.ones(3)), {"scale": torch.tensor(2.0)}), {"class": Y, "names": "abcd"})
    share = share_of(batch, 1, 2, 0)
    assert torch.equal(share.batch.inputs.args[0], X[2:])
    assert share.batch.inputs.args[1].shape == (3,)
    assert torch.equal(share.batch.labels["class"], Y[2:])
    assert share_of(Batch(Example((X,)), ["a", "b", "c", "d"]), 1, 2, 0).batch.labels == ["c", "d"]
    with pytest.raises(UsageError, match="cannot be divided among 2 processes"):
        share_of(Batch(Example((X,)), torch.tensor(1.0)), 0, 2, 0)


def values(data: Data, epoch: int, start: int = 0) -> list[Tensor]:
    return [share.batch.inputs.args[0] for share in data.epoch(epoch, start)]


def data(source: Any, rank: int = 0, world: int = 1) -> Data:
    return Data(source, reader(One()), 0, rank, world)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_order_and_noise_depend_on_nothing_but_the_place(world: int, workers: int) -> None:
    expected = values(data(loader()), 1)
    assert not torch.equal(expected[0], values(data(loader()), 0)[0])
    torch.rand(world)  # whatever went on before
    parts = [values(data(loader(workers), rank, world), 1, 2) for rank in range(world)]
    assert len(parts[0]) == len(expected) - 2
    for whole, *shares in zip(expected[2:], *parts, strict=True):
        if len(whole) >= world:  # the last batch has two samples
            assert torch.equal(torch.cat(shares), whole)


def test_each_process_loads_its_own_samples_only() -> None:
    loaded: list[int] = []

    class Counted(Augmented):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            loaded.append(index)
            return super().__getitem__(index)

    values(data(DataLoader(Counted(), batch_size=8), 1, 2), 0)
    assert loaded == [*range(4, 8), *range(12, 16), *range(19, 22)]


def test_datasets_that_load_several_at_once() -> None:
    class Together(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [(torch.tensor([float(i)]), i) for i in indices]

    shares = [values(data(DataLoader(Together(), batch_size=4), rank, 2), 0) for rank in (0, 1)]
    assert [[t.flatten().tolist() for t in part] for part in shares] == [[[0, 1], [4]], [[2, 3], [5]]]


def test_generators_of_the_loader() -> None:
    generator = torch.Generator().manual_seed(5)
    dataset = TensorDataset(torch.arange(20.0).reshape(20, 1), torch.arange(20))
    own = DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=generator), 4, False))
    state = generator.get_state()
    source = data(own)
    with source.generators_kept():
        first = values(source, 0)
        assert all(torch.equal(a, b) for a, b in zip(first, values(source, 0), strict=True))
        assert not torch.equal(torch.cat(first), torch.cat(values(source, 1)))
    assert torch.equal(generator.get_state(), state)


def test_a_stream_goes_on_anywhere() -> None:
    def read(stream: Stream) -> list[Tensor]:
        return [share.batch.inputs.args[0] for share in stream]

    whole = read(Stream(data(loader()), 3))
    assert len(whole) == 15
    for epoch, index in ((0, 3), (1, 0), (2, 4)):
        rest = read(Stream(data(loader()), 3, epoch, index))
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[epoch * 5 + index :], strict=True))


def test_a_stream_knows_the_end_of_an_epoch() -> None:
    stream = Stream(data([(X, Y)] * 2), 2)
    seen = []
    for _ in range(4):
        next(stream)
        seen.append((stream.epoch_over(), stream.epoch, stream.index, stream.done))
    assert seen == [(False, 0, 1, False), (True, 1, 0, False), (False, 1, 1, False), (True, 2, 0, True)]


def test_generators_are_read_once() -> None:
    source = data((X, Y) for _ in range(2))
    assert len(list(Stream(source, 1))) == 2
    with pytest.raises(UsageError, match="a generator, which can be read once only"):
        next(Stream(source, 1))


def test_what_is_no_data() -> None:
    for wrong in (X, {"x": X}, "text", 3):
        with pytest.raises(UsageError, match="`batches` is an iterable of batches"):
            data(wrong)
    with pytest.raises(UsageError, match="no batches in it"):
        next(Stream(data([]), 1))
    with pytest.raises(UsageError, match="no batches in it"):
        data(iter([])).first()
    sampler = DistributedSampler(Augmented(), num_replicas=2, rank=0)
    with pytest.raises(UsageError, match="DistributedSampler"):
        data(DataLoader(Augmented(), sampler=sampler))
