"""Each model in a process of its own, with limits on time and memory, so that one that crashes does not end a sweep."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from models import Model

__all__ = ["Limits", "Measure", "collect", "failures", "first_line", "sweep"]

Record = dict[str, Any]
Measure = Callable[[Model, Callable[[str], None]], Record]
"""Measures one model; calls its second argument with the name of what it is about to do."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one model may use: seconds of processor time, five times as many by the clock, bytes of address space."""

    seconds: int = 600
    memory: int = 14 << 30
    jobs: int = 1


@dataclasses.dataclass
class _Child:
    model: Model
    process: Any
    pipe: Connection
    start: float
    stage: str = "start"
    record: Record | None = None


def sweep(models: Sequence[Model], measure: Measure, limits: Limits) -> Iterator[Record]:
    """Measure every model; yield records as they come, with ``model``, ``set``, ``seconds`` and what ``measure`` says.

    Where it raises, or its process dies, ``error`` says how, ``stage`` where, and ``traceback`` holds the traceback.
    """
    waiting, running = list(models), []
    while waiting or running:
        while waiting and len(running) < limits.jobs:
            running.append(_start(waiting.pop(0), measure, limits))
        wait([child.pipe for child in running] + [child.process.sentinel for child in running], timeout=1.0)
        for child in list(running):
            _listen(child)
            late = time.monotonic() - child.start > 5 * limits.seconds
            if child.record is None and child.process.is_alive() and not late:
                continue
            running.remove(child)
            yield _finish(child, late)


def collect(models: Sequence[Model], measure: Measure, limits: Limits | None = None) -> list[Record]:
    """The records of :func:`sweep` in the order of ``models``; says how far it is."""
    records = {}
    for record in sweep(models, measure, limits or Limits()):
        records[record["set"], record["model"]] = record
        print(f"[{len(records)}/{len(models)}] {record['model']}", record["seconds"], first_line(record), flush=True)
    return [records[model.set, model.name] for model in models]


def first_line(record: Record) -> str:
    """What went wrong and where, if something did."""
    return f"{record['stage']}: {record['error'].splitlines()[0]}" if "error" in record else ""


def failures(records: Sequence[Record]) -> str:
    """A list of what went wrong, to stand below a table; empty if nothing did."""
    lines = [f"- {record['model']} failed at {first_line(record)}" for record in records if "error" in record]
    return "\n".join(["", "", *lines]) if lines else ""


def _start(model: Model, measure: Measure, limits: Limits) -> _Child:
    context = multiprocessing.get_context("fork")
    parent, pipe = context.Pipe()
    process = context.Process(target=_child, args=(model, measure, limits, pipe))
    process.start()
    pipe.close()
    return _Child(model, process, parent, time.monotonic())


def _listen(child: _Child) -> None:
    with contextlib.suppress(EOFError):  # the process is gone; its exit code tells the rest
        while child.pipe.poll():
            kind, content = child.pipe.recv()
            if kind == "stage":
                child.stage = content
            else:
                child.record = json.loads(content)


def _finish(child: _Child, late: bool) -> Record:
    if child.process.is_alive() and child.record is None:
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.join()
    _listen(child)
    child.pipe.close()
    record = child.record
    if record is None:
        code = child.process.exitcode
        over = late or code == -signal.SIGXCPU
        how = "over the time limit" if over else f"the process died with exit code {code}"
        record = {"error": how, "stage": child.stage, "traceback": ""}
    seconds = round(time.monotonic() - child.start, 2)
    return {"model": child.model.name, "set": child.model.set, "seconds": seconds, **record}


def _child(model: Model, measure: Measure, limits: Limits, pipe: Connection) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stages = ["start"]

    def stage(name: str) -> None:
        stages.append(name)
        pipe.send(("stage", name))

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                record = measure(model, stage)
            record["warnings"] = [str(w.message) for w in caught if "fxcompress" in w.category.__module__]
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {error}", "stage": stages[-1]}
            record["traceback"] = traceback.format_exc()
    pipe.send(("record", json.dumps(record)))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
