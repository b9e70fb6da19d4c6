"""Seconds by two clocks: the wall's, and the processor time of this process.

With one thread on an idle machine they agree. On one that does other things at the same time only the latter means
something; it counts all threads together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CLOCKS", "medians", "seconds"]

CLOCKS = ("wall", "cpu")

Seconds = dict[str, float]


def seconds(call: Callable[[], Any]) -> Seconds:
    """How long one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def medians(times: Sequence[Seconds]) -> Seconds:
    """The median by each clock."""
    return {clock: statistics.median(t[clock] for t in times) for clock in CLOCKS}
