"""How long a call takes, and how sure that is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.running import copied, undisturbed
from fxcompress.errors import UsageError

__all__ = ["Latency", "compare_latency", "latency"]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one call, over ``repeats`` calls.

    Attributes:
        median: the middle one.
        iqr: the distance between the quartiles, a measure of noise that outliers do not move; 0 for a single repeat.
        min: the shortest.
        repeats: how many calls were timed.
    """

    median: float
    iqr: float
    min: float
    repeats: int

    def __str__(self) -> str:
        """Median and interquartile range in one unit, as ``12.3 ms +- 0.4``."""
        unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if self.median * s >= 1), ("us", 1e6))
        median = self.median * scale
        decimals = min(2, max(0, 2 - math.floor(math.log10(max(median, 1.0)))))
        return f"{median:.{decimals}f} {unit} +- {self.iqr * scale:.{decimals}f}"


def latency(
    call: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warmup: int = 5,
    repeats: int = 30,
    min_seconds: float = 0.0,
    threads: int | None = None,
) -> Latency:
    """Time ``call(*args, **kwargs)`` without gradients.

    Work on CUDA is waited for. A module's training mode is left as it is, so say ``eval()`` if you mean inference; its
    buffers, the inputs and PyTorch's random state are as before afterwards.

    Args:
        call: a module or function.
        args: its positional arguments; all calls get the same copies.
        kwargs: its keyword arguments.
        warmup: calls before the first timed one.
        repeats: timed calls, at least.
        min_seconds: go on until the timed calls add up to this many seconds.
        threads: PyTorch's intra-op CPU threads during the measurement; ``None`` leaves the setting as it is.

    Raises:
        UsageError: ``repeats`` or ``threads`` is below 1, or ``warmup`` or ``min_seconds`` is negative.
    """
    results = compare_latency(
        {"call": call}, args, kwargs, warmup=warmup, repeats=repeats, min_seconds=min_seconds, threads=threads
    )
    return results["call"]


def compare_latency(
    candidates: Mapping[str, Callable[..., Any]],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warmup: int = 5,
    repeats: int = 30,
    min_seconds: float = 0.0,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several callables on the same inputs, in turns, so that noise and clock changes hit all of them alike.

    Each round calls every candidate once and starts with another one than the round before. Arguments and errors are
    those of :func:`latency`; ``min_seconds`` holds for each candidate; no candidates is an error too.

    Returns:
        A :class:`Latency` for each name, all with the same ``repeats``.
    """
    _check(candidates, warmup, repeats, min_seconds, threads)
    inputs = copied((tuple(args), dict(kwargs or {})))
    synchronize = _synchronizer([*candidates.values()], inputs)
    calls = list(candidates.items())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with _measuring(candidates.values(), inputs, threads):
        for _ in range(warmup):
            for _, call in calls:
                call(*inputs[0], **inputs[1])
        while any(len(times) < repeats or sum(times) < min_seconds for times in seconds.values()):
            for name, call in calls:
                seconds[name].append(_time(call, inputs, synchronize))
            calls.append(calls.pop(0))
    return {name: _summary(times) for name, times in seconds.items()}


def affordable_repeats(
    call: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float,
    fewest: int,
    most: int,
) -> int:
    """How many calls take about ``seconds``, going by one; at least ``fewest`` and at most ``most``."""
    once = latency(call, args, kwargs, warmup=1, repeats=1).median
    return min(max(int(seconds / max(once, 1e-9)), fewest), most)


def _check(candidates: Mapping[str, Any], warmup: int, repeats: int, min_seconds: float, threads: int | None) -> None:
    if not candidates:
        raise UsageError("there is nothing to time: candidates is empty")
    if repeats < 1 or warmup < 0 or min_seconds < 0 or (threads is not None and threads < 1):
        raise UsageError(
            "repeats and threads must be at least 1, warmup and min_seconds at least 0; "
            f"found {repeats=}, {threads=}, {warmup=}, {min_seconds=}"
        )


def _synchronizer(calls: Sequence[Callable[..., Any]], inputs: Any) -> Callable[[], None]:
    tensors = pytree.tree_leaves(inputs)
    for call in calls:
        if isinstance(call, nn.Module):
            tensors += [*call.parameters(), *call.buffers()]
    on_cuda = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in tensors)
    return torch.cuda.synchronize if on_cuda else lambda: None


@contextlib.contextmanager
def _measuring(calls: Any, inputs: Any, threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        for call in calls:
            if isinstance(call, nn.Module):
                stack.enter_context(undisturbed(call, inputs))
        stack.enter_context(torch.no_grad())
        if threads is not None:
            torch.set_num_threads(threads)
            stack.callback(torch.set_num_threads, before)
        yield


def _time(call: Callable[..., Any], inputs: Any, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call(*inputs[0], **inputs[1])
    synchronize()
    return time.perf_counter() - start


def _summary(times: Sequence[float]) -> Latency:
    if len(times) == 1:
        return Latency(times[0], 0.0, times[0], 1)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, upper - lower, min(times), len(times))
