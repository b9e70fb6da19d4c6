"""Put the tables of benchmarks/results/*.md and files into README.md, so that no number or code there is typed twice.

A place in the README is ``<!-- result: NAME -->`` ... ``<!-- end of result -->``; what is between becomes the contents
of ``benchmarks/results/NAME.md``. Between ``<!-- file: PATH -->`` and ``<!-- end of file -->`` is a block of code, and
becomes that file. Run ``python benchmarks/update_readme.py``; with ``--check`` nothing is written and the exit code is
1 if something would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- result: (?P<name>[\w-]+) -->\n).*?(<!-- end of result -->)", re.DOTALL)

FILE = re.compile(r"(<!-- file: (?P<path>\S+) -->\n```\w+\n).*?(```\n<!-- end of file -->)", re.DOTALL)


def updated(text: str, results: Path = RESULTS) -> str:
    """``text`` with every marked place filled from the files in ``results`` and from those that it names."""

    def fill(match: re.Match[str]) -> str:
        content = (results / f"{match['name']}.md").read_text(encoding="utf-8")
        return f"{match[1]}{content.rstrip()}\n{match[3]}"

    def quote(match: re.Match[str]) -> str:
        return f"{match[1]}{(ROOT / match['path']).read_text(encoding='utf-8')}{match[3]}"

    return FILE.sub(quote, PLACE.sub(fill, text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = updated(before)
    if before == after:
        return 0
    if arguments.check:
        print("README.md differs from benchmarks/results; run python benchmarks/update_readme.py", file=sys.stderr)
        return 1
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
