"""Latency: its arithmetic and manners. How long anything takes is not tested."""

import pytest
import torch
from torch import nn

from fxcompress.analysis import Latency, compare_latency, latency
from fxcompress.errors import UsageError


class FakeClock:
    """Each call of ``tick`` takes the next of the given seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
        self.now, self.seconds = 0.0, list(seconds)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def tick(self) -> None:
        self.now += self.seconds.pop(0)


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, 9, 1, 5, 2, 4, 3)
    found = latency(clock.tick, warmup=1, repeats=5)
    assert (found.median, found.iqr, found.min, found.repeats) == (3, 2, 1, 5)


def test_one_repeat_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert latency(FakeClock(monkeypatch, 2).tick, warmup=0, repeats=1) == Latency(2, 0, 2, 1)


def test_repeats_until_min_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, *[0.25] * 20)
    assert latency(clock.tick, warmup=0, repeats=2, min_seconds=1).repeats == 4


@pytest.mark.parametrize(
    ("median", "iqr", "text"),
    [
        (0.0123, 0.0004, "12.3 ms +- 0.4"),
        (2.5, 0.125, "2.50 s +- 0.12"),
        (0.000123, 0.000002, "123 us +- 2"),
        (4e-7, 1e-8, "0.40 us +- 0.01"),
    ],
)
def test_as_text(median: float, iqr: float, text: str) -> None:
    assert str(Latency(median, iqr, median, 10)) == text


def test_candidates_take_turns() -> None:
    order: list[str] = []
    found = compare_latency({name: lambda name=name: order.append(name) for name in "abc"}, warmup=1, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [*found] == ["a", "b", "c"]
    assert all(result.repeats == 3 for result in found.values())


def test_arguments_arrive_and_come_back_unchanged() -> None:
    x, y = torch.zeros(2), torch.ones(2, requires_grad=True)
    seen = []

    def call(a: torch.Tensor, *, b: torch.Tensor) -> None:
        seen.append((a.add_(1) * b).requires_grad)

    latency(call, (x,), {"b": y}, warmup=0, repeats=2)
    assert seen == [False, False]
    assert torch.equal(x, torch.zeros(2))


def test_threads_are_set_and_restored() -> None:
    before, seen = torch.get_num_threads(), []

    def call() -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        latency(call, threads=before + 1)
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_module_and_random_state_stay_as_they_were() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    random_state = torch.get_rng_state()
    latency(net, (torch.ones(4, 3),), warmup=1, repeats=2)
    assert net[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("option", [{"repeats": 0}, {"warmup": -1}, {"min_seconds": -1.0}, {"threads": 0}])
def test_bad_options(option: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(option))):
        latency(lambda: None, **option)


def test_nothing_to_compare() -> None:
    with pytest.raises(UsageError, match="empty"):
        compare_latency({})
