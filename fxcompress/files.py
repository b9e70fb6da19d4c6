"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from fxcompress.errors import UsageError

__all__ = ["atomically", "whole_directory", "write_text"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


@contextlib.contextmanager
def whole_directory(target: Path, ours: Collection[str]) -> Iterator[Path]:
    """A new directory beside ``target``, which takes its place only when the block succeeds.

    Args:
        target: what to make or to replace.
        ours: the names of files that may be replaced with it; others are not touched.

    Raises:
        UsageError: ``target`` is a file, or holds files of others; or it cannot be written.
    """
    _check_replaceable(target, ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {target}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for name in os.listdir(temporary):
            _sync(temporary / name)
        _check_replaceable(target, ours)
        _put_in_place(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise UsageError(f"cannot write to {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what was there before, or what was begun


def _check_replaceable(target: Path, ours: Collection[str]) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is no directory; choose another one")
    strangers = sorted(set(os.listdir(target)) - set(ours)) if target.is_dir() else []
    if strangers:
        raise UsageError(f"{target} holds other files ({', '.join(strangers[:5])}); choose another directory")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
    elif not _exchanged(new, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        os.rename(target, aside / target.name)  # without an exchange nothing is at ``target`` for a moment
        os.rename(new, target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the two names could be exchanged in one step, which Linux does."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(rename(*arguments) == 0)
