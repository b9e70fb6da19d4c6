"""What each process of a launch does: every case by name, the results written by the main one.

usage: worker.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from tests.recovery.cases import SAME, Stop, interrupted  # noqa: E402


def shard_on_cpus() -> None:
    """Let accelerate shard parameters (FSDP) without GPUs, which PyTorch can and accelerate does not offer."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if "sharded" in names:
        shard_on_cpus()
    results = {name: SAME[name]() for name in names if name in SAME}
    if "begun" in names:
        try:
            interrupted(str(folder / "begun"), 11)
        except Stop:
            results["begun"] = {}
    if "ended" in names:
        results["ended"] = interrupted(str(folder / "ended"), None).state_dict()
    if "going-on" in names:
        results["begun"] = interrupted(str(folder / "begun"), None, evaluate=lambda gm: 1.0).state_dict()
    launched = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if launched else (0, 1)
    torch.save((world, results), folder / f"results-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
