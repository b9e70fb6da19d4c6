"""The pages in docs/ say what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fxcompress.registry import registered_passes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_passes", ROOT / "docs" / "generate_passes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_passes_is_up_to_date(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "passes.md").read_text(encoding="utf-8") == generator.page(), (
        "run python docs/generate_passes.py"
    )


def test_arguments_are_read_out_of_docstrings(generator: ModuleType) -> None:
    text = "First.\n\nArgs:\n    a, b: see\n        there.\n    c: is ``c``.\n\nLast."
    prose, entries = generator._split(text)
    assert prose == "First.\n\nLast."
    assert entries == {"a": "see there.", "b": "see there.", "c": "is ``c``."}


@pytest.mark.parametrize("page", ["choosing.md", "passes.md", "architecture.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_what_to_choose_exists() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    named = {
        name.partition(":")[0] for code in re.findall(r"`([a-z0-9:=,.\- ]+)`", text) for name in re.split(r", ?", code)
    }
    passes = {name for name in named if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)}
    assert passes
    assert passes <= set(registered_passes())
