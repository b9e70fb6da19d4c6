"""Telling somebody how far a compression is: nobody, a bar on the terminal, or a function of the caller's."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Literal

from fxcompress.errors import UsageError

__all__ = ["Event", "Progress", "reporting"]


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of the work.

    Attributes:
        stage: ``"trace"``, ``"calibrate"``, ``"sites"``, ``"rewrite"``, ``"verify"``, ``"time"``, ``"recover"``,
            ``"probe"`` (one layer by itself), ``"try"`` (a whole pipeline) or ``"done"``.
        pass_name: the pass it is for; ``None`` for ``"trace"``, ``"recover"``, ``"try"`` and ``"done"``.
        done: how much of this stage is done: batches of ``"calibrate"``, sites of ``"rewrite"``, steps of
            ``"recover"``, settings of ``"probe"``, pipelines of ``"try"``.
        total: of how much; ``None`` if that is not known.
        note: how it goes, in words: the loss of ``"recover"``, what ``"try"`` tries.
    """

    stage: Literal["trace", "calibrate", "sites", "rewrite", "verify", "time", "recover", "probe", "try", "done"]
    pass_name: str | None = None
    done: int = 0
    total: int | None = None
    note: str = ""


Progress = Callable[[Event], None]


def _silent(event: Event) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def reporting(progress: bool | Progress | None) -> Iterator[Progress]:
    """The function to tell events to, while the context lasts.

    Args:
        progress: ``None`` or ``False`` for silence, ``True`` for a bar on stderr, or a function of an :class:`Event`.

    Raises:
        UsageError: it is something else.
    """
    if progress is True:
        with _bar() as tell:
            yield tell
    elif progress is None or progress is False:
        yield _silent
    elif callable(progress):
        yield progress
    else:
        raise UsageError(f"`progress` is None, True or a function of an Event, not {type(progress).__name__}")


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    what, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), note)
    with RichProgress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("start", total=None, note="")
        current = ""

        def tell(event: Event) -> None:
            nonlocal current
            description = f"{event.pass_name}: {event.stage}" if event.pass_name else event.stage
            if description != current:
                bar.reset(task, description=description, total=event.total)
                current = description
            if event.stage == "done":
                bar.update(task, total=1, completed=1, note=event.note)
            else:
                bar.update(task, completed=event.done, total=event.total, note=event.note)

        yield tell
