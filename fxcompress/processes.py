"""The processes of ``torch.distributed``, if there are several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import distributed

__all__ = ["alone", "count", "gathered", "takes"]

_ALONE = ContextVar("_ALONE", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For work that one process does while the others wait: nobody would answer it."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def count() -> int:
    """How many work together; 1 if ``torch.distributed`` is not at work, or inside :func:`alone`."""
    if _ALONE.get():
        return 1
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def takes(index: int) -> bool:
    """Whether this process is the one to do the work of that number."""
    return index % count() == (distributed.get_rank() if count() > 1 else 0)


def gathered(value: Any) -> list[Any]:
    """``value`` of each process, in order; it is pickled on the way, also one's own."""
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found
