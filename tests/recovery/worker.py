"""What each process of a launch does: every case by name, the results written by the main one.

usage: worker.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.recovery.cases import SAME, Stop, interrupted  # noqa: E402


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    results = {name: SAME[name]() for name in names if name in SAME}
    if "begun" in names:
        try:
            interrupted(str(folder / "begun"), 11)
        except Stop:
            results["begun"] = {}
    if "ended" in names:
        results["ended"] = interrupted(str(folder / "ended"), None).state_dict()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save((world, results), folder / f"results-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
