"""What a report keeps of the graphs, how the two are paired, and the page that shows them."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import io
import json
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import PassRecord, Report, UsageError
from fxcompress.analysis.cost import cost
from fxcompress.report import RefusalRecord, Total
from fxcompress.reporting import Curve, GraphSketch, NodeSketch, compare, page, sketch
from fxcompress.reporting.curves import charts
from fxcompress.reporting.graph import Group, grouped
from fxcompress.reporting.markup import Markup, tag
from fxcompress.reporting.pairing import layer_pairs, node_pairs, touched_by

NASTY = "<script>alert('x')</script>\"&"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(4) for _ in range(blocks)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> torch.fx.GraphModule:
    passes = ["fold-batch-norm", "alds:ratio=0.2,error=frobenius"]
    return fxcompress.compile(Net().eval(), passes, torch.randn(2, 4, 8, 8))


@pytest.fixture(scope="module")
def report(small: torch.fx.GraphModule) -> Report:
    return fxcompress.report(small)


def nodes(graph: GraphSketch | None) -> dict[str, NodeSketch]:
    assert graph is not None
    return {node.name: node for node in graph.nodes}


def record(**changes: Any) -> PassRecord:
    values: dict[str, Any] = dict.fromkeys(("error", "error_in_dtype"), 0.5) | {"name": "halve", "options": {}}
    values |= {"guarantee": "exact", "sites": 1, "refusals": (), "verified": True, "verification": "ok", "seconds": 1.0}
    values |= {f"{what}_{when}": 8 for what in ("parameters", "macs", "bytes") for when in ("before", "after")}
    return PassRecord(**{**values, **changes})


def text_of(markup: str) -> str:
    """What a reader sees, scripts and styles left out."""

    class Reader(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.inside: list[str] = []
            self.tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)
            if tag in ("script", "style"):
                self.inside.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if self.inside and self.inside[-1] == tag:
                self.inside.pop()

        def handle_data(self, data: str) -> None:
            if not self.inside:
                self.words.append(data)

    reader = Reader()
    reader.feed(markup)
    assert reader.tags.count("script") == 1
    return " ".join(" ".join(reader.words).split())


# ------------------------------------------------------------------------------------------------------- sketches
def test_a_sketch_is_the_graph_in_plain_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    gm = fxcompress.trace(model, torch.randn(2, 3, 8, 8))
    drawn = sketch(gm, cost(gm, (torch.randn(2, 3, 8, 8),)))
    conv = next(node for node in drawn.nodes if node.kind == "Conv2d")
    assert (conv.target, conv.layer, conv.value) == ("0", "0", "2x8x6x6 float32")
    assert (conv.parameters, conv.bytes, conv.macs) == (8 * 3 * 9 + 8, 4 * (8 * 3 * 9 + 8), 2 * 36 * 8 * 27)
    assert conv.inputs == (drawn.nodes[0].name,)
    assert conv.settings.startswith("3, 8, kernel_size=(3, 3)")
    assert [node.op for node in drawn.nodes] == [node.op for node in gm.graph.nodes]


def test_its_numbers_add_up_to_the_totals(report: Report) -> None:
    for graph, when in ((report.graph_before, "before"), (report.graph_after, "after")):
        found = nodes(graph).values()
        assert sum(node.parameters for node in found) == getattr(report.total, f"parameters_{when}")
        assert sum(node.bytes for node in found) == getattr(report.total, f"bytes_{when}")
        assert sum(node.macs or 0 for node in found) == getattr(report.total, f"macs_{when}")


def test_a_pass_without_sites_leaves_the_numbers_of_the_graph_before_it() -> None:
    gm = fxcompress.compile(nn.Sequential(nn.Linear(4, 4)), ["fold-batch-norm"], torch.randn(2, 4))
    found = fxcompress.report(gm)
    assert nodes(found.graph_before) == nodes(found.graph_after)
    assert sum(node.macs or 0 for node in nodes(found.graph_after).values()) == 2 * 16


def test_tied_and_shared_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out, self.twice = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
            self.out.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.twice(self.twice(self.table(ids))))

    gm = fxcompress.trace(Tied(), torch.tensor([[1, 2]]))
    found = [node.parameters for node in sketch(gm, cost(gm)).nodes if node.op == "call_module"]
    assert found == [28, 20, 0, 0]


def test_without_inputs_there_are_no_shapes_and_no_macs() -> None:
    with pytest.warns(UserWarning, match="nothing is verified"):
        gm = fxcompress.compile(Net().eval(), ["fold-batch-norm"])
    found = nodes(fxcompress.report(gm).graph_after).values()
    assert {node.value for node in found} == {""}
    assert {node.macs for node in found} == {None}
    assert "not measured" in text_of(page(fxcompress.report(gm).to_dict()))


def test_functions_are_in_the_module_that_called_them(report: Report) -> None:
    scopes = {node.name: node.scope for node in nodes(report.graph_before).values()}
    assert [scopes[name] for name in ("add", "relu", "add_1", "relu_1")] == ["blocks.0"] * 2 + ["blocks.1"] * 2
    assert scopes["mean"] == ""


def test_what_a_module_says_of_itself_may_fail() -> None:
    class Mute(nn.Linear):
        def extra_repr(self) -> str:
            raise RuntimeError("not today")

    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    gm.add_module("0", Mute(2, 2))
    assert [n.settings for n in sketch(gm, cost(gm)).nodes][1] == "extra_repr() failed: RuntimeError"


def test_weights_that_functions_read_count_for_their_layer() -> None:
    gm = fxcompress.compile(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval(),
        ["quantize"],
        torch.randn(4, 32),
        calibration=[torch.randn(4, 32)],
    )
    found = fxcompress.report(gm)
    assert found.graph_before is not None
    assert found.graph_after is not None
    pairs = {pair.path: pair for pair in layer_pairs(found.graph_before, found.graph_after)}
    assert pairs["0"].macs == (4 * 32 * 32,) * 2
    assert pairs["2"].macs == (4 * 32 * 4,) * 2
    assert pairs["0"].bytes[1] < pairs["0"].bytes[0] / 2


# ------------------------------------------------------------------------------------------------------ what stays
def test_it_comes_back_from_json(report: Report) -> None:
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert report.graph_before is not None
    assert GraphSketch.from_dict(report.graph_before.to_dict()) == report.graph_before


def test_it_travels_with_its_graph(small: torch.fx.GraphModule, report: Report) -> None:
    assert fxcompress.report(copy.deepcopy(small)) == report
    file = io.BytesIO(pickle.dumps(small))
    assert fxcompress.report(pickle.load(file)) == report


def test_reports_from_before_there_were_graphs_can_be_read(report: Report) -> None:
    data = report.to_dict()
    old = {"passes": data["passes"], "total": data["total"]}
    for each in old["passes"]:
        for key in ("latency_before", "latency_after", "rolled_back"):
            del each[key]
    found = Report.from_dict(old)
    assert (found.graph_before, found.graph_after, found.sensitivity) == (None, None, ())
    assert str(found) == str(report)
    assert "kept no graphs" in text_of(page(found.to_dict()))


@pytest.mark.parametrize(
    "wrong", [{"graph_before": 3}, {"graph_after": {"model": "x", "nodes": [{"nam": 1}]}}, {"sensitivity": [{}]}]
)
def test_broken_graphs_are_refused(report: Report, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no report of fxcompress"):
        Report.from_dict({**report.to_dict(), **wrong})


def test_a_second_compile_starts_where_the_first_did(small: torch.fx.GraphModule, report: Report) -> None:
    again = fxcompress.report(fxcompress.compile(small, ["remove-identity"], torch.randn(2, 4, 8, 8)))
    assert again.graph_before == report.graph_before
    assert again.graph_after is not None
    assert again.sensitivity == report.sensitivity


def test_curves_move_from_details_to_the_report(report: Report) -> None:
    assert {"blocks.0.conv", "blocks.1.conv"} <= {curve.layer for curve in report.sensitivity}
    assert all("curve" not in detail for each in report.passes for detail in each.details)
    for curve in report.sensitivity:
        settings, errors = zip(*curve.points, strict=True)
        assert list(settings) == sorted(set(settings))
        assert list(errors) == sorted(errors, reverse=True)
        assert (settings[-1], errors[-1]) == (1.0, 0.0)


# --------------------------------------------------------------------------------------------------------- pairing
def test_folded_layers_are_gone_and_what_took_them_in_has_changed(report: Report) -> None:
    assert report.graph_before is not None
    assert report.graph_after is not None
    pairs = node_pairs(report.graph_before, report.graph_after, touched_by(report.to_dict()["passes"]))
    status = {(pair.before or pair.after).name: pair.status for pair in pairs}  # type: ignore[union-attr]
    assert status["blocks_0_norm"] == "removed"
    assert {pair.status for pair in pairs if pair.before and pair.before.name.startswith("relu")} == {"same"}
    olds = [pair.before for pair in pairs if pair.before]
    assert tuple(olds) == report.graph_before.nodes
    assert tuple(pair.after for pair in pairs if pair.after) == report.graph_after.nodes
    by = {p.before.name: p.passes for p in pairs if p.before}
    assert by["blocks_0_norm"] == ("fold-batch-norm",)


def test_a_pair_of_layers_counts_for_the_one_that_it_stands_for() -> None:
    old = GraphSketch("Net", (NodeSketch("a", "call_module", "Linear", "a", layer="a", parameters=100, macs=100),))
    new = GraphSketch(
        "Net",
        (
            NodeSketch("a_encoder", "call_module", "Linear", "a.encoder", layer="a.encoder", parameters=30, macs=20),
            NodeSketch("a_decoder", "call_module", "Linear", "a.decoder", layer="a.decoder", parameters=10, macs=5),
            NodeSketch("b", "call_module", "Linear", "b", layer="b", parameters=1, macs=1),
        ),
    )
    first, second = layer_pairs(old, new)
    assert (first.path, first.parameters, first.macs) == ("a", (100, 40), (100, 25))
    assert (second.path, second.kinds_before, second.parameters) == ("b", (), (0, 1))
    assert [pair.status for pair in node_pairs(old, new, {})] == ["removed", "added", "added", "added"]


def test_a_node_that_only_reads_others_is_the_same() -> None:
    old = GraphSketch("Net", (NodeSketch("a", "call_module", "ReLU", "a", inputs=("x",)),))
    new = GraphSketch("Net", (NodeSketch("a", "call_module", "ReLU", "a", inputs=("y",)),))
    assert [pair.status for pair in node_pairs(old, new, {})] == ["same"]
    assert [pair.status for pair in node_pairs(old, new, {"a": ("equalize-layers",)})] == ["changed"]
    renamed = GraphSketch("Net", (NodeSketch("a_1", "call_module", "ReLU", "a", inputs=("y",)),))
    assert [pair.status for pair in node_pairs(old, renamed, {})] == ["same"]


def test_the_list_folds_by_module(report: Report) -> None:
    assert report.graph_before is not None
    root = grouped(node_pairs(report.graph_before, report.graph_before, {}))
    blocks = next(child for child in root.children if isinstance(child, Group))
    assert blocks.path == "blocks"
    assert [child.path for child in blocks.children if isinstance(child, Group)] == ["blocks.0", "blocks.1"]
    assert list(root.rows()) == list(range(len(report.graph_before.nodes)))


# ------------------------------------------------------------------------------------------------------------ page
def test_the_page_says_what_was_measured(report: Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "page.html", measured={"agreement": "98.4%"})
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = text_of(written)
    for words in ("Net", "fold-batch-norm → alds", "Agreement 98.4%", "blocks.0.conv", "rank ", "Error by parameters"):
        assert words in text
    assert "Latency not measured" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    timed = [dataclasses.replace(p, latency_before=0.002, latency_after=0.001) for p in report.passes]
    assert "Latency 1 ms from 2 ms" in text_of(page(dataclasses.replace(report, passes=tuple(timed)).to_dict()))


def test_latency_in_total_needs_every_pass_that_stayed() -> None:
    total = Total(8, 8, 8, 8, 8, 8, 1.0)
    timed = record(latency_before=0.003, latency_after=0.002)
    undone = record(name="slow", sites=0, latency_before=0.002, latency_after=0.009, rolled_back=True)
    assert "Latency 2 ms from 3 ms" in text_of(page(Report((timed, undone), total).to_dict()))
    assert "Latency not measured" in text_of(page(Report((timed, record()), total).to_dict()))


def test_a_page_cannot_be_written_into_nothing(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        report.to_html(tmp_path / "nowhere" / "page.html")


def test_everything_foreign_is_text() -> None:
    node = NodeSketch(NASTY, "call_module", NASTY, NASTY, (NASTY,), NASTY, NASTY, f"a.{NASTY}", NASTY, 3, 3, 3)
    foreign = record(
        name=NASTY,
        options={NASTY: NASTY},
        refusals=(RefusalRecord(NASTY, NASTY + "2", NASTY),),
        verification=NASTY,
        verified=False,
        details=({"node": NASTY, "target": NASTY, "module": NASTY, "rank": NASTY, "left_whole": NASTY},),
        warnings=(NASTY,),
        guarantee=NASTY,
    )
    total = Total(8, 8, 8, 8, 8, 8, 1.0, (NASTY,))
    curves = (Curve(NASTY, NASTY, ((1.0, 0.5), (2.0, 0.1))),)
    report = Report((foreign,), total, GraphSketch(NASTY, (node,)), GraphSketch(NASTY, (node, node)), curves)
    written = page(report.to_dict(), title=NASTY, measured={NASTY: NASTY})
    assert "<script>alert" not in written
    assert text_of(written).count("<script>alert") > 15
    assert "<script>alert" not in tag("p", [NASTY], title=NASTY, data_x=NASTY)
    assert tag("p", Markup("<b>")) == "<p><b></p>"
    both = compare(report.to_dict(), report.to_dict(), (NASTY, NASTY + "2"))
    assert NASTY in str(both)


def test_the_page_asks_for_nothing_and_its_policy_allows_nothing(report: Report) -> None:
    written = page(report.to_dict())
    without_names = written.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(:]\s*["']?(?!#|data:,)[\w/.]""", without_names)
    assert "http" not in without_names.replace("http-equiv", "")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', written)
    assert policy is not None
    assert "default-src &#x27;none&#x27;" in policy[1]
    assert "unsafe" not in policy[1]
    assert " style=" not in written


def test_a_thousand_nodes_make_a_page_of_a_few_megabytes_in_no_time() -> None:
    gm = fxcompress.compile(Net(blocks=300).eval(), ["fold-batch-norm"], torch.randn(1, 4, 4, 4), verify=False)
    found = fxcompress.report(gm)
    assert len(nodes(found.graph_before)) > 1200
    start = time.perf_counter()
    written = page(found.to_dict())
    assert time.perf_counter() - start < 5
    assert len(written) < 3_000_000
    start = time.perf_counter()
    sketch(gm, cost(gm))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "points", [[(8, 0.0)], [(1, 0.0), (2, 0.0)], [(4, 1e-6), (8, 1.0)], [(0.5, -1.0), (1, 3.0)], [(1, float("nan"))]]
)
def test_any_curve_can_be_drawn(points: list[tuple[float, float]]) -> None:
    drawn = charts([{"layer": "a", "knob": "bits", "points": points}])
    assert "nan" not in drawn
    assert drawn.count("<polyline") == (0 if points[0][1] != points[0][1] else 1)


# ------------------------------------------------------------------------------------------------------ comparison
def test_two_reports_side_by_side(report: Report, tmp_path: Path) -> None:
    other = fxcompress.report(fxcompress.compile(Net().eval(), ["fold-batch-norm"], torch.randn(2, 4, 8, 8)))
    found = compare(report.to_dict(), other.to_dict(), ("one", "two"))
    rows = {row[0]: row for row in found.totals}
    assert rows["parameters"][1:3] == (str(report.total.parameters_after), str(other.total.parameters_after))
    assert [row[::2] for row in found.passes] == [("fold-batch-norm", "fold-batch-norm"), ("alds", "")]
    assert {layer.path for layer in found.layers} <= {"blocks.0.conv", "blocks.1.conv", "head"}
    assert found.layers
    assert found.notes == ()
    found.to_html(tmp_path / "both.html")
    text = text_of((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "one and two" in text
    assert found.layers[0].path in text
    bare = dataclasses.replace(other, graph_before=None, total=Total(1, 1, 1, 1, 1, 1, 1.0))
    assert len(compare(report.to_dict(), bare.to_dict()).notes) == 2
    assert "no layer differs" in str(compare(report.to_dict(), report.to_dict()))
