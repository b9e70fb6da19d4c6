"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxcompress.errors import UsageError

__all__ = ["atomically", "write_text"]


@contextlib.contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place only when the block succeeds.

    Raises:
        UsageError: the file cannot be written.
    """
    final = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as folder:
            temporary = Path(folder) / final.name
            yield temporary
            os.replace(temporary, final)
    except OSError as error:
        raise UsageError(f"cannot write {final}: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8; raises like :func:`atomically`."""
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
