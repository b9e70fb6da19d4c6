"""Checkpoints that are there whole or not at all.

Each is a folder ``step-<n>`` that is written under another name beside it, flushed to the disk and renamed; the last
two are kept. A name that starts with ``.partial`` is what a killed process left, and is removed at the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.errors import RecoveryError, UsageError

__all__ = ["Checkpoints", "Place", "reported", "written_whole"]

_PARTIAL = ".partial-"
_KEPT = 2
_ABOUT = "recovery.json"
_SHARED = "in `checkpoint`; it must be a folder that all machines share"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is.

    Attributes:
        step: steps done.
        epoch, index: the batch that comes next.
        stage: which stage of a gradual compression, from 0.
        finished: whether nothing is left to do.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    stage: int = 0
    finished: bool = False


class Checkpoints:
    """The checkpoints of one run in a folder, which all processes see.

    Args:
        folder: the folder; it is made if need be.
        options: what the run depends on, in words; a checkpoint of another run is refused.
        accelerator: the ``accelerate.Accelerator``, which saves and loads model, optimizer and scaler.
    """

    def __init__(self, folder: str | os.PathLike[str], options: Mapping[str, str], accelerator: Any) -> None:
        self._folder, self._options, self._accelerator = Path(folder), dict(options), accelerator
        self._collectively(self._start)

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)

    def latest(self) -> Place | None:
        """Where to go on; ``None`` if there is nothing yet.

        Raises:
            UsageError: what is there is of another run, or not all processes see it.
        """
        found = self._found()
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (seen,) = broadcast_object_list([found])
            if seen != found:
                raise UsageError(f"{self._process()} does not see what the main process sees {_SHARED}")
        return found

    def _process(self) -> str:
        return f"process {self._accelerator.process_index}"

    def _found(self) -> Place | None:
        steps = self._complete()
        if not steps:
            return None
        about = json.loads((steps[-1] / _ABOUT).read_text(encoding="utf-8"))
        differences = [
            f"{key} was {about['options'].get(key, 'not there')} and is {self._options.get(key, 'not there')}"
            for key in sorted({*about["options"], *self._options})
            if about["options"].get(key) != self._options.get(key)
        ]
        if differences:
            raise UsageError(
                f"{steps[-1]} is a checkpoint of another run: {'; '.join(differences)}. Give the same arguments to go "
                "on with it, another folder, or remove it to start anew"
            )
        return Place(**about["place"])

    def load(self, place: Place) -> None:
        """Put everything that was prepared by the accelerator into the state it had at ``place``."""
        path = self._folder / _name(place.step)
        try:
            self._accelerator.load_state(str(path), load_kwargs={"weights_only": False})
        except (OSError, RuntimeError, KeyError, EOFError) as error:
            raise RecoveryError(f"the checkpoint {path} cannot be read: {error}") from error

    def save(self, place: Place) -> None:
        """Write a checkpoint and remove all but the last two.

        Raises:
            RecoveryError: it cannot be written; those before it are as they were.
        """
        about = {"place": dataclasses.asdict(place), "options": self._options}
        final = self._folder / _name(place.step)
        partial = self._folder / f"{_PARTIAL}{final.name}"
        main = self._accelerator.is_main_process
        self._collectively(lambda: _remove(partial))
        self._together(lambda: self._accelerator.save_state(str(partial), safe_serialization=False), partial)
        text = json.dumps(about, indent=1)
        self._together(lambda: _publish(partial, final, text) if main else None, partial)
        if not final.is_dir():
            raise RecoveryError(f"{self._process()} does not see {final}, which the main process wrote {_SHARED}")
        self._collectively(self._thin)

    def save_graph(self, stage: int, gm: fx.GraphModule) -> None:
        """Write the graph that a stage of a gradual compression starts with; only the main process calls this."""
        final, partial = self._folder / f"stage-{stage}", self._folder / f"{_PARTIAL}stage-{stage}"
        with reported(partial):
            _remove(final)
            partial.mkdir()
            torch.save(gm, partial / "graph.pt")
            _publish(partial, final, json.dumps(self._options))

    def load_graph(self, stage: int) -> fx.GraphModule:
        """The graph that :meth:`save_graph` wrote. It is a pickle: load only what you wrote yourself."""
        loaded: fx.GraphModule = torch.load(self._folder / f"stage-{stage}" / "graph.pt", weights_only=False)
        return loaded

    def _thin(self) -> None:
        for path in self._complete()[:-_KEPT]:
            _remove(path)

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._folder.glob(f"step-*/{_ABOUT}"))

    def _collectively(self, action: Callable[[], Any]) -> None:
        """The main process acts while the others wait."""
        if self._accelerator.is_main_process:
            with reported(self._folder):
                action()
        self._accelerator.wait_for_everyone()

    def _together(self, action: Callable[[], Any], partial: Path) -> None:
        """All act; if one fails all raise, and nothing half written stays."""
        failure: RecoveryError | None = None
        try:
            with reported(partial):
                action()
        except RecoveryError as error:
            failure = error
        failed = torch.tensor(float(failure is not None), device=self._accelerator.device)
        if float(self._accelerator.reduce(failed)):
            if self._accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise failure or RecoveryError(f"another process could not write the checkpoint {partial}")


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Errors of the disk as :class:`RecoveryError`. PyTorch's writer makes a bare ``RuntimeError`` of them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise RecoveryError(
            f"{path} cannot be written ({error}); make room or choose another folder. Checkpoints that were there "
            "before are as they were, and the same call goes on from the last one"
        ) from error


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _remove(path: Path) -> None:
    """Remove a folder in such a way that what is left of it half-way is taken for nothing."""
    if path.exists():
        gone = path if path.name.startswith(_PARTIAL) else path.with_name(f"{_PARTIAL}old-{path.name}")
        if gone != path:
            os.replace(path, gone)
        shutil.rmtree(gone)


def _publish(partial: Path, final: Path, about: str) -> None:
    """Give a folder that is written its name, after all of it is on the disk."""
    (partial / _ABOUT).write_text(about, encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    _remove(final)
    os.replace(partial, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def written_whole(path: Path, text: str) -> None:
    """Replace the contents of a file at once."""
    with reported(path):
        partial = path.with_name(f"{_PARTIAL}{path.name}")
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        os.replace(partial, path)
