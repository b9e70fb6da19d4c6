"""Data for statistics: read from whatever the caller has, run once for all statistics that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress import processes
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.running import GraphRunner
from fxcompress.errors import FxCompressError, PassError, UsageError
from fxcompress.examples import check_fits, map_tensors
from fxcompress.pass_base import Example, Observation, Observer

__all__ = ["Batches", "Changed", "as_batches", "check_batch", "checked", "collect"]


class Batches:
    """Calibration data as :class:`Example` objects, to be read as often as needed. Made by :func:`as_batches`."""

    def __init__(self, source: Iterable[Any], device: torch.device | None = None) -> None:
        self._source = source
        self._device = device
        self._spent = False

    def __iter__(self) -> Iterator[Example]:
        iterator = iter(self._source)
        if self._spent:
            raise UsageError("the calibration data is a generator and was read already; pass a list or a DataLoader")
        self._spent = iterator is self._source
        count = 0
        for count, batch in enumerate(iterator, start=1):
            yield self._to_device(_as_example(batch, count - 1))
        if not count:
            raise UsageError("the calibration data has no batches in it")

    def count(self) -> int | None:
        """How many batches there are, if the data knows."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except TypeError:  # generators and iterable datasets have no length
            return None

    def _to_device(self, example: Example) -> Example:
        device = self._device
        tensors = tensor_leaves((example.args, example.kwargs))
        if device is None or all(tensor.device == device for _, tensor in tensors):
            return example
        return map_tensors(example, lambda tensor: tensor.to(device))


class Changed:
    """Batches after ``change``, as often as they themselves can be read."""

    def __init__(self, batches: Iterable[Example], change: Callable[[Example], Example]) -> None:
        self._batches, self._change = batches, change

    def __iter__(self) -> Iterator[Example]:
        return map(self._change, self._batches)

    def count(self) -> int | None:
        """How many batches there are, if the data knows."""
        return self._batches.count() if isinstance(self._batches, (Batches, Changed)) else None


def as_batches(calibration: Any, *, keep: bool = True, device: torch.device | None = None) -> Batches:
    """Read calibration data from what the caller gave.

    Args:
        calibration: an iterable (list, ``DataLoader``, generator) of batches, each a tensor (the only positional
            argument), a tuple or list of positional arguments, a mapping of keyword arguments, or an :class:`Example`.
        keep: hold the batches of a one-shot iterator in memory, so that they can be read again.
        device: where tensors are moved to when they are elsewhere (a ``DataLoader`` gives them on the CPU).

    Raises:
        UsageError: it is no iterable of batches. What a batch is shows only when it is read.
    """
    if isinstance(calibration, Batches):
        return calibration
    if isinstance(calibration, (torch.Tensor, Mapping, Example, str)) or not isinstance(calibration, Iterable):
        raise UsageError(
            "`calibration` is an iterable of batches, such as a list or a DataLoader, not "
            f"{type(calibration).__name__}; put a single batch into a list"
        )
    one_shot = isinstance(calibration, Iterator)
    return Batches(list(calibration) if one_shot and keep else calibration, device)


def _as_example(batch: Any, index: int) -> Example:
    if isinstance(batch, Example):
        return batch
    if isinstance(batch, torch.Tensor):
        return Example((batch,))
    if isinstance(batch, Mapping):
        return Example((), batch)
    if isinstance(batch, (tuple, list)):
        return Example(tuple(batch))
    raise UsageError(
        f"batch {index} of the calibration data is a {type(batch).__name__}; expected a tensor, a tuple or list of "
        "positional arguments, a mapping of keyword arguments, or an fxcompress.Example"
    )


def check_batch(gm: fx.GraphModule, batch: Example, index: int) -> None:
    """Refuse a batch that does not fit the graph.

    Raises:
        UsageError: it does not, and what to do.
    """
    placeholders = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    starred = any(name.startswith("*") for name in placeholders)
    if len(batch.args) > len(placeholders) and not starred:
        raise UsageError(
            f"batch {index} of the calibration data has {len(batch.args)} positional items ({_kinds(batch.args)}) but "
            f"the model takes {len(placeholders)} ({', '.join(placeholders)}). If the items are inputs and labels, "
            "pass the inputs only: `calibration=[images for images, labels in loader]`"
        )
    try:
        check_fits(gm, batch)
    except UsageError as error:
        raise UsageError(f"batch {index} of the calibration data: {error}") from error


def checked(gm: fx.GraphModule, batches: Iterable[Example]) -> list[Example]:
    """All batches, for who needs them at once.

    Raises:
        UsageError: one does not fit the graph, or there are none.
    """
    data = list(batches)
    for index, batch in enumerate(data):
        check_batch(gm, batch, index)
    return data


def _kinds(items: Iterable[Any]) -> str:
    return ", ".join(
        f"Tensor{tuple(item.shape)}" if isinstance(item, torch.Tensor) else type(item).__name__ for item in items
    )


class _Collector(GraphRunner):
    def __init__(self, gm: fx.GraphModule, observers: Mapping[fx.Node, Mapping[str, Observer]]) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # the user's own traceback says more than the generated code's
        self._observers = observers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for key, observer in self._observers.get(n, {}).items():
            try:
                observer.update(value)
            except Exception as error:
                raise PassError(
                    f"the observer {key!r} of node {n.name!r} ({n.target!s}) failed on a {_kinds([value])}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return value


def collect(
    gm: fx.GraphModule,
    batches: Iterable[Example],
    observations: Sequence[Observation],
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[tuple[fx.Node, str], Any]:
    """Run ``gm`` once over the data and let every observer see the values of its node; no value is kept.

    Runs without gradients and in the mode (training or evaluation) that ``gm`` is in; buffers and random state are
    afterwards as they were. Where ``torch.distributed`` is at work each process runs its part of the batches, and all
    get the results of the whole, if every observer can be merged.

    Args:
        gm: the graph.
        batches: its inputs.
        observations: who wants to see what. Wishes with the same node and key share one observer.
        progress: called with (batches done, batches in all if known).

    Returns:
        The result of each observer by (node, key).

    Raises:
        UsageError: a batch does not fit the graph or the graph fails on it, an observation is of another graph, or
            there are no batches.
        PassError: an observer fails.
    """
    observers: dict[fx.Node, dict[str, Observer]] = {}
    for wish in observations:
        if wish.node.graph is not gm.graph:
            raise UsageError(f"the observation {wish.key!r} is of node {wish.node.name!r} of another graph")
        mine = observers.setdefault(wish.node, {})
        if wish.key not in mine:
            mine[wish.key] = wish.factory()
    all_ = [observer for mine in observers.values() for observer in mine.values()]
    shared = processes.count() > 1 and all(hasattr(observer, "merge") for observer in all_)
    _show(gm, _Collector(gm, observers), batches, progress, processes.takes if shared else None)
    if shared:
        _merge(all_)
    return {(node, key): observer.result() for node, mine in observers.items() for key, observer in mine.items()}


def _show(
    gm: fx.GraphModule,
    collector: _Collector,
    batches: Iterable[Example],
    progress: Callable[[int, int | None], None] | None,
    takes: Callable[[int], bool] | None,
) -> None:
    """Run the batches, of which only those that ``takes`` says."""
    total = batches.count() if isinstance(batches, (Batches, Changed)) else None
    for index, batch in enumerate(batches):
        check_batch(gm, batch, index)
        if takes is not None and not takes(index):
            continue
        own = map_tensors(batch, torch.Tensor.clone)
        try:
            collector.observe(own.args, own.kwargs)
        except FxCompressError:
            raise
        except Exception as error:
            raise UsageError(
                f"the model failed on batch {index} of the calibration data ({_kinds(batch.args)}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if progress is not None:
            progress(index + 1, total)


def _merge(observers: Sequence[Any]) -> None:
    """Let those of every process know what those of all others saw, in the order of the processes."""
    distinct = list({id(observer): observer for observer in observers}.values())  # several nodes may share one
    for observer, seen in zip(distinct, zip(*processes.gathered(distinct), strict=True), strict=True):
        first, *others = seen
        for other in others:
            first.merge(other)
        vars(observer).update(vars(first))
