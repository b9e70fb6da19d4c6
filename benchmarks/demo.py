"""The table of ``fxcompress demo``: writes benchmarks/results/demo.md and demo.json.

Run ``python benchmarks/demo.py`` and then ``python benchmarks/update_readme.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fxcompress import demo

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = demo.run(repeats=arguments.repeats, with_torch_compile=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.md").write_text(f"```text\n{result}\n```\n", encoding="utf-8")
    (RESULTS / "demo.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
