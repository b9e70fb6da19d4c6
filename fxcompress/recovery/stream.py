"""Reading the data: every process its own share of every batch, from any place on, in the same order each time."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fxcompress.errors import UsageError
from fxcompress.pass_base import Example
from fxcompress.recovery.batches import Batch, Reader, Share, bounds, share_of
from fxcompress.recovery.seeds import seed_data, seed_of

__all__ = ["Data", "Stream"]


class Data:
    """The caller's batches.

    Args:
        source: an iterable of batches. Of a ``DataLoader`` over a dataset with indices each process loads only its own
            share; of anything else every process reads whole batches, which must be the same, and takes its share.
        reader: tells inputs from labels.
        seed: what the order and the random numbers of datasets depend on.
        rank, world: which process of how many this is.

    Raises:
        UsageError: it is no iterable of batches.
    """

    def __init__(self, source: Any, reader: Reader, seed: int, rank: int, world: int) -> None:
        if isinstance(source, (torch.Tensor, Mapping, Example, str)) or not isinstance(source, Iterable):
            raise UsageError(
                "`batches` is an iterable of batches, such as a list or a DataLoader, not "
                f"{type(source).__name__}; put a single batch into a list"
            )
        self._source: Iterable[Any] = source
        self._reader, self._seed, self._rank, self._world = reader, seed, rank, world
        self.one_shot = isinstance(source, Iterator)
        self._spent = False
        for sampler in _samplers(source):
            if isinstance(sampler, DistributedSampler):
                raise UsageError(
                    "the DataLoader has a DistributedSampler, but recover divides batches among the processes itself; "
                    "pass the loader that one process would use"
                )

    def length(self) -> int | None:
        """How many batches an epoch has, if the data knows."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except TypeError:  # generators and iterable datasets have no length
            return None

    @contextlib.contextmanager
    def generators_kept(self) -> Iterator[None]:
        """Put the states of the loader's own random generators back on leaving."""
        states = [(generator, generator.get_state()) for generator in _generators(self._source)]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)

    def first(self) -> Batch:
        """The first batch of the first epoch, whole.

        Raises:
            UsageError: there is none.
        """
        self._prepare(0)
        seed_data(self._seed, 0, 0, "order")
        iterator = iter(self._source)
        try:
            batch = next(iterator)
        except StopIteration:
            raise UsageError("the data has no batches in it") from None
        if self.one_shot:
            self._source = itertools.chain([batch], iterator)
        return self._reader.read(batch, 0)

    def epoch(self, number: int, start: int) -> Iterator[Share]:
        """This process's shares of the batches of an epoch from batch ``start`` on.

        Raises:
            UsageError: there are no batches, one is no batch, or a generator is to be read again.
        """
        if self._spent:
            raise UsageError(
                "the data is a generator, which can be read once only, and its end was reached before that of the "
                "training; pass a list or a DataLoader, or fewer epochs or steps"
            )
        self._spent = self.one_shot
        self._prepare(number)
        source, empty = self._source, not start
        for share in self._loaded(source, number, start) if _has_indices(source) else self._sliced(number, start):
            empty = False
            yield share
        if empty:
            raise UsageError("the data has no batches in it")

    def _prepare(self, epoch: int) -> None:
        for index, generator in enumerate(_generators(self._source)):
            generator.manual_seed(seed_of(self._seed, epoch, "generator", index))
        for part in (self._source, *_samplers(self._source)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        seed_data(self._seed, epoch, "start")

    def _sliced(self, epoch: int, start: int) -> Iterator[Share]:
        iterator = iter(self._source)
        for index in itertools.count():
            seed_data(self._seed, epoch, index, "order")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if index >= start:
                yield share_of(self._reader.read(batch, index), self._rank, self._world, index)

    def _loaded(self, loader: Any, epoch: int, start: int) -> Iterator[Share]:
        shard = _Shard(loader.batch_sampler, (self._seed, epoch, start), self._rank, self._world)
        for index, batch in enumerate(_like(loader, shard), start=start):
            yield Share(self._reader.read(batch, index), shard.weights.popleft())


class Stream:
    """Epoch after epoch, from any place on.

    Attributes:
        epoch, index: the batch that comes next.
    """

    def __init__(self, data: Data, epochs: int | None, epoch: int = 0, index: int = 0) -> None:
        self._data, self._epochs = data, epochs
        self.epoch, self.index = epoch, index
        self._shares: Iterator[Share] | None = None
        self._ahead: Share | None = None

    def __iter__(self) -> Iterator[Share]:
        return self

    def __next__(self) -> Share:
        while self._ahead is None:
            if self.done:
                raise StopIteration
            self.epoch_over()
        share, self._ahead = self._ahead, None
        self.index += 1
        return share

    @property
    def done(self) -> bool:
        """Whether no epoch is left to go through."""
        return self._epochs is not None and self.epoch >= self._epochs

    def epoch_over(self) -> bool:
        """Whether the batch before was the last of its epoch; then what comes next is the first of the next one."""
        if self._shares is None:
            self._shares = self._data.epoch(self.epoch, self.index)
        self._ahead = self._ahead or next(self._shares, None)
        if self._ahead is not None:
            return False
        self._shares, self.epoch, self.index = None, self.epoch + 1, 0
        return True


class _Shard:
    """A batch sampler: of each batch of ``sampler`` the part of one process, each index with the seed of its sample."""

    def __init__(self, sampler: Iterable[Any], place: tuple[int, int, int], rank: int, world: int) -> None:
        self._sampler, self._place, self._rank, self._world = sampler, place, rank, world
        self.weights: collections.deque[float] = collections.deque()

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        seed, epoch, start = self._place
        iterator: Iterator[Any] | None = None
        for index in itertools.count():
            seed_data(seed, epoch, index, "order")
            iterator = iterator if iterator is not None else iter(self._sampler)
            try:
                indices = list(next(iterator))
            except StopIteration:
                return
            if index < start:
                continue
            if not indices:
                raise UsageError(f"batch {index} is empty: the batch sampler gave no indices")
            low, high, weight = bounds(len(indices), self._rank, self._world)
            self.weights.append(weight)
            yield [(seed_of(seed, epoch, index, place), indices[place]) for place in range(low, high)]


class _Seeded(Dataset[Any]):
    """The samples of ``dataset``, each drawn from random numbers of its own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        seed, index = key
        seed_data(seed)
        return self.dataset[index]


class _SeededTogether(_Seeded):
    """The same for a dataset that loads several samples at once: random numbers are those of the first."""

    def __getitems__(self, keys: list[tuple[int, Any]]) -> Any:
        seed_data(keys[0][0])
        return self.dataset.__getitems__([index for _, index in keys])


def _like(loader: Any, shard: _Shard) -> Iterable[Any]:
    together = callable(getattr(loader.dataset, "__getitems__", None))
    return DataLoader(
        (_SeededTogether if together else _Seeded)(loader.dataset),
        batch_sampler=shard,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        generator=torch.Generator().manual_seed(0),
    )


def _has_indices(source: Any) -> bool:
    """Whether ``source`` loads batches by index, in the way of ``DataLoader`` itself."""
    return (
        isinstance(source, DataLoader)
        and type(source).__iter__ is DataLoader.__iter__
        and not isinstance(source.dataset, IterableDataset)
        and source.batch_sampler is not None
    )


def _samplers(source: Any) -> list[Any]:
    if not isinstance(source, DataLoader):
        return []
    found = [source.sampler, source.batch_sampler, getattr(source.batch_sampler, "sampler", None), source.dataset]
    return list({id(part): part for part in found if part is not None}.values())


def _generators(source: Any) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for part in (source, *_samplers(source))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
