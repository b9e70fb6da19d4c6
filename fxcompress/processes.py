"""The processes of ``torch.distributed``, if there are several."""

from __future__ import annotations

from typing import Any

from torch import distributed

__all__ = ["count", "gathered", "takes"]


def count() -> int:
    """How many there are; 1 if it is not at work."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def takes(index: int) -> bool:
    """Whether this process is the one to do the work of that number."""
    return index % count() == (distributed.get_rank() if count() > 1 else 0)


def gathered(value: Any) -> list[Any]:
    """``value`` of each process, in order; it is pickled on the way, also one's own."""
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found
