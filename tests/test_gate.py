"""What does not pay is rolled back, in passes that add and remove time, by a clock that only they move."""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Guarantee, Pass, PassContext, Report, Site, UsageError, editing
from fxcompress.analysis.latency import Latency
from fxcompress.gate import groups, is_slower


class Clock:
    """Seconds, of which a reading takes a thousandth."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _our_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxcompress.analysis.latency")
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=CLOCK.perf_counter))


class Wait(nn.Module):
    """The identity, after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CLOCK.now += self.seconds
        return x


@dataclasses.dataclass(frozen=True)
class Slow(Pass):
    """Waits before every ReLU, and stores twice as many numbers."""

    seconds: float = 0.01
    name: ClassVar[str] = "slow"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.ReLU):
                yield Site(node, context.gm)

    def rewrite(self, site: Site) -> None:
        gm, wait = site.data, Wait(self.seconds)
        wait.register_buffer("more", torch.zeros(100))
        path = editing.add_module(gm, "wait", wait.train(gm.training))
        with gm.graph.inserting_before(site.node):
            site.node.update_arg(0, gm.graph.call_module(path, (site.node.args[0],)))


@dataclasses.dataclass(frozen=True)
class SlowUntilFast(Slow):
    name: ClassVar[str] = "slow-until-fast"
    pays_with: ClassVar[frozenset[str]] = frozenset({"fast"})


@dataclasses.dataclass(frozen=True)
class ToTrain(Slow):
    name: ClassVar[str] = "to-train"
    timed: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Fast(Pass):
    """Takes all waiting away."""

    name: ClassVar[str] = "fast"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), Wait):
                yield Site(node)

    def rewrite(self, site: Site) -> Mapping[str, str]:
        source = site.node.all_input_nodes[0]
        editing.replace(site.node, source)
        return {"now": source.name}


@dataclasses.dataclass(frozen=True)
class Fine(Fast):
    """Finds nothing here."""

    name: ClassVar[str] = "fine"

    def sites(self, context: PassContext) -> Iterator[Site]:
        yield from ()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.randn(2, 4)


def test_a_pass_that_is_slower_is_rolled_back(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="pass 'slow': rolled back its 1 sites: it took a call"):
        gm = fxcompress.compile(model, [Slow(), "remove-identity"], X, reject_slower=True)
    assert not any(isinstance(m, Wait) for m in gm.modules())
    assert torch.equal(gm(X), model(X))
    record, other = fxcompress.report(gm).passes
    assert record.rolled_back
    assert (record.sites, record.details, record.error) == (0, (), 0.0)
    assert record.latency_before is not None
    assert record.latency_after is not None
    assert record.latency_after > 0.009 > record.latency_before
    for what in ("parameters", "macs", "bytes"):
        assert getattr(record, f"{what}_before") == getattr(record, f"{what}_after") == getattr(other, f"{what}_before")
    assert (other.rolled_back, other.latency_before) == (False, None), "it had no sites, so there was nothing to time"
    report = fxcompress.report(gm)
    assert report.total.bytes_before == report.total.bytes_after
    assert "ms, rolled back" in str(report)
    assert Report.from_dict(report.to_dict()) == report


def test_without_the_option_nothing_is_measured(model: nn.Module) -> None:
    gm = fxcompress.compile(model, [Slow()], X)
    (record,) = fxcompress.report(gm).passes
    assert (record.sites, record.rolled_back) == (1, False)
    assert record.latency_before is record.latency_after is None
    assert "latency" not in str(fxcompress.report(gm))


def test_a_pass_that_pays_stays(model: nn.Module) -> None:
    slow = fxcompress.compile(model, [Slow()], X)
    gm = fxcompress.compile(slow, [Fast()], X, reject_slower=True)
    record = fxcompress.report(gm).passes[-1]
    assert (record.sites, record.rolled_back) == (1, False)
    assert record.latency_before is not None
    assert record.latency_after is not None
    assert record.latency_before > 0.009 > record.latency_after


def test_passes_that_pay_together_are_judged_together(model: nn.Module) -> None:
    gm = fxcompress.compile(model, [SlowUntilFast(), Fine(), Fast()], X, reject_slower=True)
    first, between, last = fxcompress.report(gm).passes
    assert [r.sites for r in (first, between, last)] == [1, 0, 1]
    assert first.latency_after == between.latency_before
    assert first.latency_after is not None
    assert first.latency_after > 0.009
    with pytest.warns(UserWarning, match="'slow-until-fast', 'fast', 'slow' together"):
        # The end of a group may be slow for other reasons: a third pass that the second pays with.
        gm = fxcompress.compile(model, [SlowUntilFast(), _FastWithSlow(), Slow()], X, reject_slower=True)
    assert [r.rolled_back for r in fxcompress.report(gm).passes] == [True, True, True]
    assert not any(isinstance(m, Wait) for m in gm.modules())
    with pytest.warns(UserWarning, match="rolled back"):
        gm = fxcompress.compile(model, [SlowUntilFast(), "remove-identity"], X, reject_slower=True)
    assert fxcompress.report(gm).passes[0].rolled_back, "what it pays with is not there"


@dataclasses.dataclass(frozen=True)
class _FastWithSlow(Fast):
    name: ClassVar[str] = "fast"
    pays_with: ClassVar[frozenset[str]] = frozenset({"slow"})


def test_what_is_there_to_train_is_not_judged(model: nn.Module) -> None:
    gm = fxcompress.compile(model, [ToTrain()], X, reject_slower=True)
    (record,) = fxcompress.report(gm).passes
    assert (record.sites, record.latency_before) == (1, None)


def test_later_passes_work_on_what_is_left(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="rolled back"):
        gm = fxcompress.compile(model, [Slow(), Fast()], X, reject_slower=True)
    assert [r.sites for r in fxcompress.report(gm).passes] == [0, 0]


def test_it_wants_example_inputs(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="`example_inputs`"):
        fxcompress.compile(model, [Slow()], reject_slower=True)


def test_training_mode_and_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout()).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.warns(UserWarning, match="rolled back"):
        gm = fxcompress.compile(model, [Slow()], X, reject_slower=True)
    assert gm.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in gm.state_dict().items())


def test_distillation_is_not_timed(model: nn.Module) -> None:
    from fxcompress.passes.distillation import AttachDistillation

    passes = [AttachDistillation(model), "detach-distillation"]
    gm = fxcompress.compile(model, passes, X, reject_slower=True)
    assert [r.latency_before for r in fxcompress.report(gm).passes] == [None, None]
    assert torch.equal(gm(X), model(X))


def test_groups() -> None:
    slow, until, fast, fine = Slow(), SlowUntilFast(), Fast(), Fine()
    assert groups([]) == []
    assert groups([slow, fast]) == [range(1), range(1, 2)]
    assert groups([until, slow]) == [range(1), range(1, 2)]
    assert groups([fine, until, fine, fast, fast]) == [range(1), range(1, 4), range(4, 5)]
    assert groups([until, _FastWithSlow(), slow]) == [range(3)]
    assert groups([fast, until]) == [range(1), range(1, 2)]


@pytest.mark.parametrize(
    ("after", "iqr", "slower"), [(1.04, 0.0, False), (1.06, 0.0, True), (1.5, 0.6, False), (0.5, 0.0, False)]
)
def test_slower_is_more_than_noise(after: float, iqr: float, slower: bool) -> None:
    assert is_slower(Latency(1.0, iqr, 0.9, 9), Latency(after, 0.0, 0.9, 9)) is slower
    assert is_slower(Latency(1.0, 0.0, 0.9, 9), Latency(after, iqr, 0.9, 9)) is slower


def test_reports_without_latencies_can_still_be_read(model: nn.Module) -> None:
    data = fxcompress.report(fxcompress.compile(model, ["remove-identity"], X)).to_dict()
    for record in data["passes"]:
        for new in ("latency_before", "latency_after", "rolled_back"):
            del record[new]
    (record,) = Report.from_dict(data).passes
    assert (record.latency_before, record.latency_after, record.rolled_back) == (None, None, False)


def test_a_group_around_what_is_not_timed_is_not_judged(model: nn.Module) -> None:
    passes = [SlowUntilFast(), ToTrain(), _FastWithSlow(), Slow()]
    gm = fxcompress.compile(model, passes, X, reject_slower=True)
    assert not any(r.rolled_back or r.latency_before for r in fxcompress.report(gm).passes)
