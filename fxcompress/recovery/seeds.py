"""Random numbers as a function of place: which epoch, which batch, which sample, which step.

Nothing has to be remembered then. A run that goes on from a checkpoint draws what an unbroken one would have drawn, and
so does a dataset that augments its samples, however many processes and workers share them.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import torch

__all__ = ["random_state_kept", "seed_data", "seed_of", "seed_step"]


def seed_of(*place: int | str) -> int:
    """A number of 63 bits that depends on all of ``place``."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little") >> 1


def seed_data(*place: int | str) -> None:
    """Seed what datasets draw from: ``random``, numpy and PyTorch on the CPU."""
    import numpy as np

    seed = seed_of(*place)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_step(*place: int | str) -> None:
    """Seed what a network draws from: PyTorch on all devices."""
    torch.manual_seed(seed_of(*place))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the states of ``random``, numpy and PyTorch (all devices) back on leaving."""
    import numpy as np

    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)
