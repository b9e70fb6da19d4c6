"""The knapsack against all choices."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.searching.knapsack import best_within, front

_NUMBERS = st.integers(0, 40).map(lambda n: n / 8)  # sums of these are exact
_GROUPS = st.lists(st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=1, max_size=4), min_size=1, max_size=5)


def _all(groups: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(sum(s for s, _ in picks), sum(e for _, e in picks)) for picks in itertools.product(*groups)]


@given(_GROUPS, st.floats(0, 25))
def test_the_best_within_any_budget_is_that_of_all_choices(
    groups: list[list[tuple[float, float]]], budget: float
) -> None:
    fitting = [(e, s) for s, e in _all(groups) if s <= budget]
    found = best_within(front(groups), budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert (found.error, found.size) == min(fitting)
    chosen = [group[pick] for group, pick in zip(groups, found.picks, strict=True)]
    assert (sum(s for s, _ in chosen), sum(e for _, e in chosen)) == (found.size, found.error)


@given(_GROUPS)
def test_the_front_falls_and_has_nothing_that_another_beats(groups: list[list[tuple[float, float]]]) -> None:
    found = front(groups)
    for a, b in itertools.pairwise(found):
        assert a.size < b.size
        assert a.error > b.error
    assert (found[0].size, found[-1].error) == (min(s for s, _ in _all(groups)), min(e for _, e in _all(groups)))


@given(_GROUPS)
def test_with_few_states_what_is_found_is_still_a_choice(groups: list[list[tuple[float, float]]]) -> None:
    for choice in front(groups, states=3):
        chosen = [group[pick] for group, pick in zip(groups, choice.picks, strict=True)]
        assert (sum(s for s, _ in chosen), sum(e for _, e in chosen)) == (choice.size, choice.error)


def test_many_groups_stay_close_to_the_bound() -> None:
    groups = [[(0.0, 0.0), (-1.0 - 0.01 * i, 1.0 + 0.37 * (i * 7 % 11)), (-2.0, 5.0 + i % 3)] for i in range(60)]
    exact, thinned = front(groups, states=10**6), front(groups, states=500)
    for budget in (-20.0, -50.0, -80.0):
        a, b = best_within(exact, budget), best_within(thinned, budget)
        assert a is not None
        assert b is not None
        assert a.error <= b.error <= 1.03 * a.error


def test_what_is_not_finite_is_never_chosen() -> None:
    found = front([[(0.0, 0.0), (-1.0, math.inf)]])
    assert [c.picks for c in found] == [(0,)]
    assert best_within(found, -0.5) is None


def test_no_groups_have_one_choice() -> None:
    assert [(c.size, c.error, c.picks) for c in front([])] == [(0.0, 0.0, ())]


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_a_tie_is_kept_once(budget: float) -> None:
    found = best_within(front([[(0.0, 1.0), (0.0, 1.0)]]), budget)
    assert found is not None
    assert found.picks == (0,)
