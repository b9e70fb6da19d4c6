"""What was measured, in a file, so that a search that was cut off goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxcompress.errors import UsageError
from fxcompress.files import write_text

__all__ = ["Store"]

_FORMAT = 1


class Store:
    """Records by key, of one search; kept in a JSON file if there is a path. Others may be in the file as well.

    Args:
        path: the file; need not exist. ``None`` keeps nothing.
        fingerprint: what tells this search from others.

    Raises:
        UsageError: the file is something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path = None if path is None else Path(path)
        self._all: dict[str, dict[str, Any]] = {}
        self.measured = 0
        """How many records were made, and not read."""
        if self._path is not None:
            if not self._path.parent.is_dir():
                raise UsageError(f"`resume` is a file in a folder that exists; there is no {self._path.parent}")
            if self._path.exists():
                self._all = _read(self._path)
        self._mine = self._all.setdefault(fingerprint, {})

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of ``key``, if there is one."""
        found: dict[str, Any] | None = self._mine.get(key)
        return found

    def record(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of ``key``; measured if there is none yet."""
        if key not in self._mine:
            self._mine[key] = measure()
            self.measured += 1
            self._write()
        found: dict[str, Any] = self._mine[key]
        return found

    def _write(self) -> None:
        if self._path is None:
            return
        text = json.dumps({"fxcompress-search": _FORMAT, "searches": self._all}, allow_nan=True)
        write_text(self._path, text)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        searches = data["searches"] if data["fxcompress-search"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no file of a search ({error!r}); give `resume` another name, or remove it"
        ) from error
    if not isinstance(searches, dict) or not all(_is_search(s) for s in searches.values()):
        raise UsageError(f"{path} is no file of a search of this version; give `resume` another name, or remove it")
    return searches


def _is_search(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(r, dict) and _is_record(r) for r in value.values())


def _is_record(record: dict[str, Any]) -> bool:
    if "refused" in record:
        return isinstance(record["refused"], str)
    error = record.get("error")
    return isinstance(error, (int, float)) and not math.isnan(error)
