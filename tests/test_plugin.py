"""A pass of another package: ``tests/plugin`` installed beside this one, as its users would."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fxcompress
from tests import contract
from tests.networks import Network
from tests.strategies import networks

PLUGIN = Path(__file__).resolve().parent / "plugin"
MODEL = """
import torch
from torch import nn


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)).eval()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on the path: the installed plugin, and a model."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, work / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(work / "site")]
    run_python("-m", "pip", "install", *options, str(work / "source"), cwd=work)
    (work / "site" / "chains.py").write_text(MODEL, encoding="utf-8")
    return work / "site"


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pass_is_known_by_name(site: Path, tmp_path: Path) -> None:
    code = (
        "import fxcompress, torch, chains\n"
        "assert fxcompress.registered_passes()['merge-linear'].__module__ == 'fxcompress_merge_linear'\n"
        "model, x = chains.chain(), torch.randn(2, 8)\n"
        "small = fxcompress.compile(model, ['merge-linear'], x)\n"
        "torch.testing.assert_close(small(x), model(x))\n"
        "record = fxcompress.report(small).passes[0]\n"
        "print(record.sites, record.verified, record.error < 1e-9, len(list(small.children())))\n"
    )
    assert "1 True True" in run_python("-c", code, cwd=tmp_path, path=site)


def test_the_command_line_knows_it(site: Path, tmp_path: Path) -> None:
    arguments = ["compress", "chains:chain", "--passes", "merge-linear,remove-identity", "--input", "2,8"]
    start = "from fxcompress.cli import main; raise SystemExit(main())"
    out = run_python("-c", start, *arguments, "--out", str(tmp_path / "out"), cwd=tmp_path, path=site)
    assert "merge-linear" in out
    passes = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["passes"]
    assert [p["name"] for p in passes] == ["merge-linear", "remove-identity"]
    assert passes[0]["parameters_after"] < passes[0]["parameters_before"]


# ------------------------------------------------------------------------------------------------- what it does
@functools.cache
def plugin() -> ModuleType:
    """The module from its file, under a name of its own."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("plugin_under_test", PLUGIN / "fxcompress_merge_linear.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def merged(model: nn.Module, x: Tensor) -> Any:
    small = fxcompress.compile(model.eval(), [plugin().MergeLinear()], x)
    torch.testing.assert_close(small(x), model(x))
    return fxcompress.report(small).passes[0], small


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_three_become_one(biases: tuple[bool, bool]) -> None:
    first, last = biases
    model = nn.Sequential(nn.Linear(4, 5, first), nn.Linear(5, 6, False), nn.Linear(6, 3, last))
    record, small = merged(model, torch.randn(2, 4))
    assert record.sites == 2
    assert record.parameters_after == 12 + 3 * any(biases)
    assert [type(module) for module in small.modules()].count(nn.Linear) == 1


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (2.0, 3.0, 5.0, 7.0), strict=True):
            parameter.fill_(value)
    _, small = merged(model, torch.randn(2, 1))
    assert [p.item() for p in small.parameters()] == [10.0, 22.0]  # 5 (2 x + 3) + 7


def test_a_write_in_between_is_not_read() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.a(x)
            x.add_(1)
            return self.b(y) + x

    record, _ = merged(Writes(), torch.randn(2, 4))
    assert record.sites == 1


@pytest.mark.parametrize("case", ["a bottleneck", "another reader", "a shared layer"])
def test_what_is_left_alone(case: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y if case == "another reader" else self.b(self.b(y))

    model = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 16)) if case == "a bottleneck" else Shared()
    record, _ = merged(model, torch.randn(2, 16 if case == "a bottleneck" else 4))
    assert record.sites == 0
    assert record.refusals


@settings(max_examples=15)
@given(network=networks())
def test_drawn_networks(network: Network) -> None:
    contract.check_contract(plugin().MergeLinear(), network)
