"""What the README shows works as shown."""

import re
from pathlib import Path

from fxcompress.registry import registered_passes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_in_order(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 10
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "fold-batch-norm" in capsys.readouterr().out


def test_results_are_quoted_not_typed() -> None:
    quoted = re.findall(r"<!-- result: ([\w-]+) -->\n(.*?)<!-- end of result -->", README, re.DOTALL)
    assert "demo" in dict(quoted)
    for name, text in quoted:
        assert text == (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")


def test_files_are_quoted_not_typed() -> None:
    quoted = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n<!-- end of file -->", README, re.DOTALL)
    assert quoted
    for name, text in quoted:
        assert text == (ROOT / name).read_text(encoding="utf-8")


def test_the_registered_passes_are_listed() -> None:
    for name, cls in registered_passes().items():
        assert f"| `{name}` | {cls.guarantee.value} |" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
