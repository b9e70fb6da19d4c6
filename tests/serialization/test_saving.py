"""Saving is refused where something has no form, and is whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from tests.serialization.saved import GRAPHS, Convolutions, check_same


def _graph() -> torch.fx.GraphModule:
    return fxcompress.trace(Convolutions().eval(), torch.randn(1, 3, 8, 8))


def test_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fxcompress.UsageError, match="Linear"):
        fxcompress.save(nn.Linear(1, 1), tmp_path / "saved")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_hooks_are_refused(tmp_path: Path) -> None:
    gm = _graph()
    gm.head.register_forward_hook(lambda *_: None)
    with pytest.raises(fxcompress.SerializationError, match=r"head.*hooks"):
        fxcompress.save(gm, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_hooks_of_graphs_inside_are_refused(tmp_path: Path) -> None:
    outer, inner = torch.fx.Graph(), _graph()
    outer.output(outer.call_module("inner", (outer.placeholder("x"),)))
    gm = torch.fx.GraphModule({"inner": inner}, outer)
    fxcompress.save(gm, tmp_path / "saved")
    inner.register_forward_hook(lambda *_: None)
    with pytest.raises(fxcompress.SerializationError, match=r"inner.*hooks"):
        fxcompress.save(gm, tmp_path / "saved")


def test_what_only_holds_others_needs_no_trust(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        pass

    root, holder = nn.Module(), nn.Module()
    root.holder, holder.foreign = holder, Foreign()
    holder.foreign.linear = nn.Linear(3, 3)
    graph = torch.fx.Graph()
    graph.output(graph.call_module("holder.foreign.linear", (graph.placeholder("x"),)))
    gm = torch.fx.GraphModule(root, graph)
    gm.holder.foreign = holder.foreign  # torch.fx had put a plain module in its place
    fxcompress.save(gm, tmp_path / "saved")
    x = torch.randn(2, 3)
    torch.testing.assert_close(fxcompress.load(tmp_path / "saved")(x), gm(x))


def test_parametrised_layers_are_refused(tmp_path: Path) -> None:
    gm = _graph()
    torch.nn.utils.parametrizations.weight_norm(gm.head)
    with pytest.raises(fxcompress.SerializationError, match="head"):
        fxcompress.save(gm, tmp_path / "saved")


def test_functions_inside_functions_are_refused(tmp_path: Path) -> None:
    gm = _graph()
    with gm.graph.inserting_before(next(iter(reversed(gm.graph.nodes)))):
        gm.graph.call_function(lambda: None)
    with pytest.raises(fxcompress.SerializationError, match="lambda"):
        fxcompress.save(gm, tmp_path / "saved")


def test_tensors_without_data_and_other_kinds_are_refused(tmp_path: Path) -> None:
    for value in (torch.empty(2, device="meta"), torch.ones(2).to_sparse()):
        gm = _graph()
        gm.register_buffer("odd", value)
        with pytest.raises(fxcompress.SerializationError, match="odd"):
            fxcompress.save(gm, tmp_path / "saved")


def test_a_method_put_over_is_refused(tmp_path: Path) -> None:
    gm = _graph()
    gm.head.forward = torch.relu
    with pytest.raises(fxcompress.SerializationError, match="forward"):
        fxcompress.save(gm, tmp_path / "saved")


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(fxcompress.UsageError, match=r"notes\.txt"):
        fxcompress.save(_graph(), tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fxcompress.UsageError, match="no directory"):
        fxcompress.save(_graph(), tmp_path / "file")


def test_a_save_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    first, second = GRAPHS["pruned"][0](), GRAPHS["recurrent"][0]()
    fxcompress.save(first, tmp_path / "deep" / "saved")
    fxcompress.save(second, tmp_path / "deep" / "saved")
    check_same(second, fxcompress.load(tmp_path / "deep" / "saved"))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["saved"]


def test_a_failed_save_leaves_the_earlier_one(tmp_path: Path) -> None:
    gm = GRAPHS["pruned"][0]()
    fxcompress.save(gm, tmp_path / "saved")
    bad = _graph()
    bad.register_buffer("odd", torch.empty(2, device="meta"))
    with pytest.raises(fxcompress.SerializationError):
        fxcompress.save(bad, tmp_path / "saved")
    check_same(gm, fxcompress.load(tmp_path / "saved"))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


_WRITER = """
import sys, torch, fxcompress
from torch import nn
graphs = [fxcompress.trace(nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]), torch.randn(1, 256)) for _ in "ab"]
for value, gm in enumerate(graphs):
    for p in gm.parameters():
        p.data.fill_(value)
print("ready", flush=True)
while True:
    for gm in graphs:
        fxcompress.save(gm, sys.argv[1])
"""


def test_a_killed_save_leaves_one_or_the_other(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    values = set()
    for delay in (0.0, 0.01, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        while not target.exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        gm = fxcompress.load(target)
        values |= {len({float(p.detach().mean()) for p in gm.parameters()})}
    assert values == {1}  # all of one graph or all of the other
