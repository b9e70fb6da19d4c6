"""A training that is killed with SIGKILL again and again, and what it ends with.

usage: kills.py FOLDER, which prints how often it was killed, and how often while a checkpoint was being written.

Python, PyTorch and the package are imported once; each training runs in a fork of this process, which itself never
computes anything.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import accelerate  # noqa: E402, F401
import torch  # noqa: E402

from fxcompress.passes.pruning import PruneChannels  # noqa: E402
from fxcompress.recovery import Gradual  # noqa: E402
from tests.recovery.cases import interrupted, network  # noqa: E402


def plain(folder: str) -> Any:
    return interrupted(folder, None, gm=network("dropout"), optimizer="adamw", lr=0.003, checkpoint_every=2, steps=12)


def pruned(ratio: float) -> PruneChannels:
    return PruneChannels(ratio=ratio)


def gradual(folder: str) -> Any:
    return interrupted(folder, None, gradual=Gradual(pruned, 0.0, 0.6, 3), steps=9)


def die_at(count: int) -> None:
    """From now on, the ``count``-th call that changes or flushes a folder is the last thing this process does."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.replace, os.fsync, shutil.rmtree = dying(os.replace), dying(os.fsync), dying(shutil.rmtree)  # type: ignore[assignment]


def fork(training: Callable[[str], Any], folder: Path, death: int | None = None) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        if death is not None:
            die_at(death)
        gm = training(str(folder / "checkpoints"))
        torch.save(gm.state_dict(), folder / "result.pt")
        os._exit(0)
    finally:
        os._exit(1)


def ended(child: int) -> bool:
    """Whether the training came to its end; otherwise it was killed."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the training failed"
    return not os.WIFSIGNALED(status)


def partial(folder: Path) -> set[tuple[str, int]]:
    """What is half written."""
    return {(path.name, path.stat().st_mtime_ns) for path in (folder / "checkpoints").glob(".partial*")}


def trial(training: Callable[[str], Any], folder: Path, deaths: range, kills: int) -> None:
    name = training.__name__
    unbroken, broken = folder / f"{name}-unbroken", folder / f"{name}-broken"
    unbroken.mkdir()
    broken.mkdir()
    assert ended(fork(training, unbroken))
    killed = writing = 0
    for death in [*deaths, *[None] * kills]:
        before = partial(broken)
        child = fork(training, broken, death)
        if death is None:
            time.sleep(random.uniform(0.2, 1.0))
            os.kill(child, signal.SIGKILL)
        if not ended(child):
            killed += 1
            writing += bool(partial(broken) - before)
    assert ended(fork(training, broken))
    first, second = (torch.load(path / "result.pt") for path in (unbroken, broken))
    same = all(torch.equal(first[key], second[key]) for key in first) and len(first) == len(second)
    left = sorted(path.name for path in (broken / "checkpoints").iterdir())
    print(name, killed, writing, same, *left)


if __name__ == "__main__":
    random.seed(0)
    trial(plain, Path(sys.argv[1]), range(1, 26, 4), 3)
    trial(gradual, Path(sys.argv[1]), range(3, 27, 8), 1)
