"""fxcompress.search on small networks: what it finds, what it says, and that it goes on where it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Guarantee, Knob, Pass, PassContext, Site
from fxcompress.analysis.cost import cost
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.progress import Event

IMAGE = (3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def data(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, *IMAGE, generator=generator) for _ in range(count)]


PRUNE_AND_FACTORISE = ("prune-channels", "fold-batch-norm", "alds")


def searched(model: nn.Module | None = None, **options: Any) -> fxcompress.SearchResult:
    batches = data()
    given: dict[str, Any] = {
        "target": {"params": 0.5},
        "max_drop": 10.0,
        "calibration": batches,
        "passes": PRUNE_AND_FACTORISE,
        "tries": 6,
        **options,
    }
    return fxcompress.search(network() if model is None else model, batches[0][:1], **given)


@pytest.fixture(scope="module")
def plain() -> fxcompress.SearchResult:
    return searched()


# ------------------------------------------------------------------------------------------------- what is found
@pytest.mark.parametrize(("measure", "part"), [("macs", 0.6), ("bytes", 0.4)])
def test_the_target_is_met_and_what_is_said_of_the_result_is_so(measure: str, part: float) -> None:
    model = network()
    result = searched(model, target={measure: part})
    assert result.met
    x = data()[0][:1]
    before, after = cost(fxcompress.trace(model, x), (x,)), cost(result.module, (x,))
    sizes = {
        "params": after.parameters / before.parameters,
        "macs": (after.macs or 0) / (before.macs or 1),
        "bytes": (after.parameter_bytes + after.buffer_bytes) / (before.parameter_bytes + before.buffer_bytes),
    }
    for name, left in sizes.items():
        assert result.best.cost[name] == pytest.approx(left)
    assert sizes[measure] <= part
    y, z = (torch.cat([gm(batch) for batch in data()]).detach() for gm in (model, result.module))
    assert result.best.error == pytest.approx(float((y - z).norm() / y.norm()), rel=1e-3)
    assert result.best.drop == result.best.error


def test_it_beats_every_single_pass_of_the_same_size() -> None:
    result = searched(target={"bytes": 0.2}, passes=(*PRUNE_AND_FACTORISE, "quantize"), tries=10)
    x, model = data()[0][:1], network()
    assert result.met
    for passes in (["prune-channels:ratio=0.8,measure=params"], ["fold-batch-norm", "alds:ratio=0.8"]):
        single = fxcompress.compile(model, passes, x, verify=False)
        y, z = (torch.cat([gm(batch) for batch in data()]) for gm in (model, single))
        assert result.best.error < 0.7 * float((y - z).norm() / y.norm())
    assert any(p.name == "quantize" for p in result.passes)


def test_the_passes_make_the_same_graph_again() -> None:
    model, x = network(), data()[0][:1]
    result = searched(model, passes=(*PRUNE_AND_FACTORISE, "quantize"), target={"bytes": 0.2})
    again = fxcompress.compile(model, result.passes, x, calibration=data())
    assert again.code == result.module.code
    torch.testing.assert_close(again(x), result.module(x), rtol=0, atol=0)


def test_the_front_falls_and_nothing_tried_beats_it(plain: fxcompress.SearchResult) -> None:
    result = plain
    costs, drops = [p.cost["params"] for p in result.front], [p.drop for p in result.front]
    assert costs == sorted(costs)
    assert drops == sorted(drops, reverse=True)
    assert len(set(drops)) == len(drops)
    for point in result.tried:
        assert any(p.cost["params"] <= point.cost["params"] and p.drop <= point.drop for p in result.front)
    assert result.best in result.front
    assert set(result.best.cost) == {"latency", "macs", "params", "bytes"}


def test_sensitivity_has_every_layer_and_is_in_the_report(plain: fxcompress.SearchResult) -> None:
    result = plain
    found = {(c.knob, c.layer) for c in result.sensitivity}
    layers = ("0", "3", "5")
    assert found == {("prune-channels ratio", n) for n in layers} | {("alds ratio", n) for n in (*layers, "9")}
    for curve in result.sensitivity:
        assert [x for x, _ in curve.points] == sorted(x for x, _ in curve.points)
        assert all(y >= 0 for _, y in curve.points)
    report = fxcompress.report(result.module)
    own = len(report.sensitivity) - len(result.sensitivity)  # what passes say of layers comes first
    assert report.sensitivity[own:] == result.sensitivity
    assert fxcompress.Report.from_dict(json.loads(report.to_json())).sensitivity == report.sensitivity


def test_sensitivity_is_what_a_layer_does_alone() -> None:
    model, batches = network(), data(2)
    result = searched(model, calibration=batches, passes=("alds",), held_out=batches)
    curve = next(c for c in result.sensitivity if c.layer == "3")
    for ratio, error in curve.points:
        gm = fxcompress.compile(model, [f"alds:per_layer={{'3': {ratio}}}"], batches[0][:1])
        y, z = model(batches[0]), gm(batches[0])
        assert error == pytest.approx(float((y - z).norm() / y.norm()), rel=1e-3)


def test_latency_is_a_target() -> None:
    result = searched(target={"latency": 0.95}, passes=("fold-batch-norm", "prune-channels"), tries=3)
    assert result.measure == "latency"
    assert all(p.cost["latency"] > 0 for p in result.tried)


def test_what_was_lucky_once_is_not_within_a_target_of_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.searching.measuring import Judge

    seen: dict[int, int] = {}

    def lucky(self: Judge, gm: nn.Module) -> float:
        seen[id(gm)] = seen.get(id(gm), 0) + 1
        return 0.5 if seen[id(gm)] == 1 else 0.7

    monkeypatch.setattr(Judge, "latency", lucky)
    result = searched(target={"latency": 0.6}, passes=("alds",), tries=1)
    assert result.within_target is None
    assert not result.met
    assert {p.cost["latency"] for p in result.tried} == {0.7, 1.0}
    assert searched(target={"latency": 0.8}, passes=("alds",), tries=1).met


def test_the_model_and_the_data_stay_as_they_are() -> None:
    model, batches = network(), data()
    state, copies = copy.deepcopy(model.state_dict()), [b.clone() for b in batches]
    searched(model, calibration=batches, passes=(*PRUNE_AND_FACTORISE, "quantize"), tries=1)
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))
    assert not model.training


def test_a_compressed_graph_can_be_searched() -> None:
    x = data()[0][:1]
    gm = fxcompress.compile(network(), ["fold-batch-norm"], x)
    result = searched(gm, passes=("alds",))
    assert [p.name for p in fxcompress.report(result.module).passes] == ["fold-batch-norm", "alds"]


# ------------------------------------------------------------------------------------------------- what is not met
def test_a_target_that_cannot_be_met_is_said() -> None:
    result = searched(target={"params": 0.01}, passes=("fold-batch-norm", "alds"))
    assert not result.met
    assert result.within_target is None
    assert result.within_drop is not None
    assert "the target was not met by anything tried" in str(result)
    with pytest.raises(UsageError, match="not met"):
        _ = result.module
    with pytest.raises(UsageError, match="not met"):
        _ = result.passes


def test_a_drop_that_cannot_be_met_is_said() -> None:
    result = searched(max_drop=0.0, passes=("fold-batch-norm", "alds"))
    assert not result.met
    assert result.within_target is not None
    assert result.within_target.cost["params"] <= 0.5
    assert result.within_drop is not None
    assert result.within_drop.drop <= 0.0
    assert "max_drop was not met within the target" in str(result)
    with pytest.raises(UsageError, match="max_drop was not met"):
        _ = result.best


# ------------------------------------------------------------------------------------------------- evaluate
def test_evaluate_says_what_is_lost() -> None:
    model, batches = network(), data()
    labels = [model(b).argmax(1) for b in batches]

    def accuracy(gm: nn.Module) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return sum((gm(b).argmax(1) == y).sum() for b, y in zip(batches, labels, strict=True)) / 32  # type: ignore

    result = searched(model, evaluate=accuracy, max_drop=0.5, passes=("alds",), tries=2)
    for point in result.tried[1:]:
        gm = fxcompress.compile(model, list(point.passes), batches[0][:1], calibration=batches, verify=False)
        with torch.no_grad():
            assert point.drop == pytest.approx(1 - float(accuracy(gm)))


@pytest.mark.parametrize(
    ("value", "message"), [("good", "must give a number"), (None, "must give a number"), (float("nan"), "NaN")]
)
def test_an_evaluate_that_gives_no_number_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        searched(evaluate=lambda gm: value, passes=("alds",))


# ------------------------------------------------------------------------------------------------- going on
def again(model: nn.Module | None = None, **options: Any) -> fxcompress.SearchResult:
    return searched(model, **{"passes": ("fold-batch-norm", "alds"), "tries": 2, **options})


class _Killed(BaseException):
    pass


def _killer(after: int) -> Any:
    seen = []

    def tell(event: Event) -> None:
        if event.stage in ("probe", "try"):
            seen.append(event)
        if len(seen) > after:
            raise _Killed

    return tell


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from fxcompress.searching.store import Store

    made: list[str] = []
    record = Store.record

    def counting(self: Store, key: str, measure: Any) -> Any:
        def measured() -> Any:
            made.append(key)
            return measure()

        return record(self, key, measured)

    monkeypatch.setattr(Store, "record", counting)
    return made


@pytest.mark.parametrize("after", [5, 14])
def test_one_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    file = tmp_path / "measured.json"
    made = _counted(monkeypatch)
    whole = again()
    all_of_them, made[:] = list(made), []
    with pytest.raises(_Killed):
        again(resume=file, progress=_killer(after))
    before = list(made)
    assert before
    made.clear()
    result = again(resume=file)
    assert not set(before) & set(made)
    assert set(before) | set(made) == set(all_of_them)
    assert [(p.error, str(p)) for p in result.tried] == [(p.error, str(p)) for p in whole.tried]
    made.clear()
    again(resume=file)
    assert made == []
    assert [p.name for p in tmp_path.iterdir()] == ["measured.json"]


def test_another_model_or_data_is_measured_anew_and_another_target_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "measured.json"
    again(resume=file)
    made = _counted(monkeypatch)
    again(resume=file, target={"params": 0.6})
    assert not any(key.startswith("probe") for key in made)
    made.clear()
    other = network()
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1.0  # type: ignore[union-attr,operator,index]
    again(other, resume=file)
    probes = sum(key.startswith("probe") for key in made)
    assert probes == 12
    made.clear()
    again(resume=file, calibration=data(3))
    assert sum(key.startswith("probe") for key in made) == probes
    made.clear()
    again(resume=file)
    assert made == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fxcompress-search": 99, "searches": {}}', '{"a": 1'])
def test_another_file_is_not_taken_for_one(tmp_path: Path, text: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="no file of a search"):
        searched(resume=file)
    assert file.read_text() == text


def test_the_time_limit_holds_and_is_said(tmp_path: Path) -> None:
    def slow(event: Event) -> None:
        """Whatever this machine measures meanwhile, ten events take longer than the limit."""
        time.sleep(0.05)

    start = time.perf_counter()
    result = again(time_limit=0.3, resume=tmp_path / "measured.json", progress=slow)
    assert time.perf_counter() - start < 10  # one measurement that began is finished
    assert not result.complete
    assert "stopped by time_limit" in str(result)
    assert result.tried[0].drop == 0
    later = again(resume=tmp_path / "measured.json")
    assert later.complete
    assert later.met


def test_progress_is_told() -> None:
    events: list[Event] = []
    searched(progress=events.append, passes=("alds",), tries=1)
    stages = list(dict.fromkeys(e.stage for e in events))
    assert stages == ["trace", "probe", "try", "done"]
    probes = [e for e in events if e.stage == "probe"]
    assert [e.done for e in probes] == list(range(len(probes)))
    assert {e.total for e in probes} == {len(probes)}


# ------------------------------------------------------------------------------------------------- third parties
@dataclasses.dataclass(frozen=True)
class RoundWeights(Pass):
    """A pass of somebody else: rounds weights to so many decimals; nothing gets smaller."""

    name: ClassVar[str] = "round-weights"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    decimals: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def knobs(self, context: PassContext) -> Iterator[Knob]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.Linear):
                yield Knob(str(node.target), "decimals", (2, 1))

    def turned(self, settings: Mapping[str, float]) -> Pass:
        return RoundWeights(settings)

    def sites(self, context: PassContext) -> Iterator[Site]:
        for node in context.gm.graph.nodes:
            if str(node.target) in self.decimals:
                yield Site(node, context.module(node), {"decimals": self.decimals[str(node.target)]})

    def rewrite(self, site: Site) -> None:
        site.data.weight.copy_(site.data.weight.round(decimals=int(site.detail["decimals"])))


def test_a_pass_of_somebody_else_joins_in() -> None:
    result = searched(passes=("alds", RoundWeights()), tries=2)
    assert [c.points[0][0] for c in result.sensitivity if c.knob == "round-weights decimals"] == [2.0]
    assert "round-weights" not in [p.name for p in result.passes]  # it costs and saves nothing


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"params": 1.0}}, "above 0 and below 1"),
        ({"target": {"params": 0}}, "above 0 and below 1"),
        ({"target": {"size": 0.5}}, "`target` has one of latency, macs, params, bytes"),
        ({"target": {}}, "`target` has one of"),
        ({"target": {"params": 0.5, "macs": 0.5}}, "`target` has one of"),
        ({"target": 0.5}, "`target` has one of"),
        ({"max_drop": -0.1}, "max_drop is what may be lost"),
        ({"tries": 0}, "tries must be at least 1"),
        ({"calibration": None}, "give `calibration`"),
        ({"calibration": data()[0]}, "an iterable of batches"),
        ({"passes": ("fold-batch-norm",)}, "there is nothing to choose: none of them has knobs"),
        ({"passes": ("no-such-pass",)}, "there is no pass"),
        ({"passes": ("alds", "fold-batch-norm", "cast-precision")}, "directly behind the pass that it belongs to"),
        ({"passes": ("alds",), "resume": "no/such/folder/file.json"}, "a folder that exists"),
        ({"time_limit": 0}, "time_limit is in seconds"),
    ],
)
def test_a_wrong_call_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        searched(**options)


def test_without_inputs_nothing_is_searched() -> None:
    with pytest.raises(UsageError, match="give `example_inputs`"):
        fxcompress.search(network(), None, target={"params": 0.5}, calibration=data())


def test_a_pass_that_refuses_the_model_is_left_out_and_named() -> None:
    result = searched(network().train(), passes=("alds", "quantize"), target={"params": 0.7})
    assert [name for name, _ in result.left_out] == ["quantize"]
    assert "left out: quantize: quantize: the model is in training mode" in str(result)


def test_a_model_that_all_passes_refuse_is_refused() -> None:
    with pytest.raises(UsageError, match=r"there is nothing to choose: quantize: .*training mode"):
        searched(network().train(), passes=("quantize",))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises((UsageError, PreconditionError), match="nothing to choose"):
        fxcompress.search(nn.ReLU(), torch.randn(2, 3), target={"macs": 0.5}, calibration=[torch.randn(2, 3)])
