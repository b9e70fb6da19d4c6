"""Files of JSON that are read only up to a size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxcompress.errors import SerializationError

__all__ = ["read_json", "read_limited"]

_MOST = 1 << 26
"""Bytes; a graph of 100,000 nodes has about a third of it."""


def read_limited(path: Path, most: int = _MOST) -> bytes:
    """The bytes of a file of at most ``most``.

    Raises:
        SerializationError: it is not there, or larger.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > most:
            raise SerializationError(f"{path} is no file, or has more than {most} bytes, which none of its kind has")
        with path.open("rb") as file:
            return file.read(size)  # reading with a limit would take memory for the limit
    except OSError as error:
        raise SerializationError(f"{path} cannot be read: {error}") from error


def read_json(data: bytes, name: str) -> Any:
    """What ``data`` says.

    Raises:
        SerializationError: it is no JSON.
    """
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SerializationError(f"{name} is no JSON ({error}); the file is damaged") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
