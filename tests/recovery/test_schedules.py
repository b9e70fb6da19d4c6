"""Learning rates and ratios over time, against what the papers say, by hand."""

from __future__ import annotations

import math

import pytest

from fxcompress.errors import UsageError
from fxcompress.recovery import Gradual, Milestones, Rewound, Warmup, constant, cosine, linear
from fxcompress.recovery.schedules import as_schedule


def test_shapes() -> None:
    assert [constant(s, 4) for s in (0, 4)] == [1, 1]
    assert [linear(s, 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [cosine(s, 4) for s in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    assert cosine(1, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert cosine(9, 4) == pytest.approx(0)


def test_warm_up() -> None:
    schedule = Warmup("linear", 2)
    assert [schedule(s, 6) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert Warmup("linear", 10)(5, 3) == 0.6


def test_milestones() -> None:
    schedule = Milestones((0.5, 0.75), 0.1)
    assert [schedule(s, 4) for s in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("original", ["cosine", "linear", Milestones(), Warmup("cosine", 3)])
def test_rewound_is_the_end_of_the_original(original: object) -> None:
    shape = as_schedule(original)
    assert [Rewound(original, 0.25)(s, 10) for s in range(10)] == [shape(30 + s, 40) for s in range(10)]  # type: ignore[arg-type]
    assert [Rewound(original)(s, 10) for s in range(10)] == [shape(s, 10) for s in range(10)]  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["cosinus", 3, None])
def test_no_schedule(wrong: object) -> None:
    with pytest.raises(UsageError, match="a schedule is one of constant, linear, cosine"):
        as_schedule(wrong)


def test_wrong_options() -> None:
    for wrong in (lambda: Rewound("cosine", 0.0), lambda: Rewound("cosine", 1.5), lambda: Warmup("cosine", 0)):
        with pytest.raises(UsageError):
            wrong()


def named(ratio: float) -> str:
    return f"svd:ratio={ratio}"


def test_curves_of_gradual() -> None:
    # Zhu & Gupta, equation 1, with s_i = 0, s_f = 0.8, n = 4.
    assert Gradual(named, 0.0, 0.8, 4).ratios() == pytest.approx(
        [0, 0.8 * (1 - 27 / 64), 0.8 * (1 - 8 / 64), 0.8 * (1 - 1 / 64), 0.8]
    )
    assert Gradual(named, 0.2, 0.8, 3, "linear").ratios() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Gradual(named, 0.0, 0.875, 3, "exponential").ratios() == pytest.approx([0, 0.5, 0.75, 0.875])
    assert Gradual(named, 0.0, 0.5, 1).ratios() == [0, 0.5]


def test_what_a_ratio_is_of() -> None:
    def ratio(plan: Gradual, step: int) -> float:
        return float(str(plan.pass_of(step)).partition("=")[2])

    halves = Gradual(named, 0.0, 0.875, 3, "exponential")
    assert [ratio(halves, k) for k in range(3)] == pytest.approx([0.5, 0.5, 0.5])
    original = Gradual(named, 0.0, 0.875, 3, "exponential", ratio_of="original")
    assert [ratio(original, k) for k in range(3)] == pytest.approx([0.5, 0.75, 0.875])
    left = 1.0
    uneven = Gradual(named, 0.0, 0.7, 5)
    for k in range(5):
        left *= 1 - ratio(uneven, k)
    assert left == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options", [(0.5, 0.5, 2), (-0.1, 0.5, 2), (0.0, 1.0, 2), (0.0, 0.5, 0), (0.0, 0.5, 2, "quartic")]
)
def test_wrong_gradual(options: tuple[float, float, int]) -> None:
    with pytest.raises(UsageError):
        Gradual(named, *options)
