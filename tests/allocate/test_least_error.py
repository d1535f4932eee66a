import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import hull_levels, least_error, least_error_levels, levels_in_order
from layerwise.errors import BudgetError, ConfigError, ScoreError


def brute(errors, costs, budget):
    """The least sum over every choice within the budget."""
    names = list(costs)
    sums = [
        math.fsum(errors[name][level] for name, level in zip(names, choice, strict=True))
        for choice in itertools.product(*(costs[name] for name in names))
        if sum(costs[name][level] for name, level in zip(names, choice, strict=True)) <= budget
    ]
    return min(sums)


COSTS = {"a": {2: 20, 4: 40}, "b": {2: 20, 4: 40}, "c": {2: 2, 4: 4}}
SIZES = {"a": 10, "b": 10, "c": 1}
ERRORS = {"a": {2: 10.0, 4: 1.0}, "b": {2: 8.0, 4: 1.0}, "c": {2: 3.0, 4: 1.0}}


def test_worked_by_hand():
    # 63 bits: falls per bit are c 1, a 0.45, b 0.35; c takes 44, a would take 64, one too many, and so would b
    hull = hull_levels(ERRORS, COSTS, SIZES, 63 / 21)
    assert hull.levels == {"a": 2, "b": 2, "c": 4}
    assert hull.error == 19.0
    assert hull.bound == pytest.approx(19 - 19 * 0.45)
    best = least_error_levels(ERRORS, COSTS, SIZES, 63 / 21)
    assert best.levels == {"a": 4, "b": 2, "c": 2}
    assert (best.error, best.bound, best.exact) == (12.0, 12.0, True)


def test_at_both_ends_there_is_one_choice():
    for bits, level in ((2.0, 2), (4.0, 4)):
        best = least_error_levels(ERRORS, COSTS, SIZES, bits)
        assert set(best.levels.values()) == {level}
        assert best.exact
    with pytest.raises(BudgetError, match="take 2 to 4 bits"):
        least_error_levels(ERRORS, COSTS, SIZES, 1.9)


def test_a_level_above_the_hull_is_used_where_it_fits_best():
    """Between 2 and 4 bits, 3 lies above the line; a budget of 3 can only be met with it."""
    errors, costs = {"a": {2: 4.0, 3: 3.5, 4: 0.0}}, {"a": {2: 2, 3: 3, 4: 4}}
    assert hull_levels(errors, costs, {"a": 1}, 3.0).levels == {"a": 2}
    assert least_error_levels(errors, costs, {"a": 1}, 3.0).levels == {"a": 3}


def test_more_bits_that_are_worse_are_not_bought():
    errors, costs = {"a": {2: 4.0, 3: 1.0, 4: 2.0}}, {"a": {2: 2, 3: 3, 4: 4}}
    assert least_error_levels(errors, costs, {"a": 1}, 4.0).levels == {"a": 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_errors_that_are_none_are_refused(bad):
    with pytest.raises(ScoreError, match='"b" at 4 bits'):
        least_error_levels({**ERRORS, "b": {2: 1.0, 4: bad}}, COSTS, SIZES, 3)
    with pytest.raises(ConfigError, match='"b" has no error'):
        least_error_levels({**ERRORS, "b": {2: 1.0}}, COSTS, SIZES, 3)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 6))
    levels = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
    sizes = {f"n{i}": draw(st.sampled_from([1, 2, 3, 3, 7, 20])) for i in range(count)}
    costs = {name: {level: level * size + 1 for level in levels} for name, size in sizes.items()}
    amount = st.integers(0, 30) | st.floats(0, 100, allow_nan=False)
    errors = {name: {level: float(draw(amount)) for level in levels} for name in sizes}
    return errors, costs, sizes


@settings(deadline=None, max_examples=300)
@given(problems(), st.floats(0, 1))
def test_exact_as_brute_force_and_never_worse_than_the_hull_or_an_order(problem, share):
    errors, costs, sizes = problem
    total = sum(sizes.values())
    least, most = (sum(pick(of.values()) for of in costs.values()) for pick in (min, max))
    budget = round(least + (most - least) * share)
    best, hull = (rule(errors, costs, sizes, budget / total) for rule in (least_error_levels, hull_levels))
    right = brute(errors, costs, budget)
    assert best.error == pytest.approx(right, rel=1e-12, abs=1e-12)
    assert best.exact
    for choice in (best, hull):
        assert sum(costs[name][level] for name, level in choice.levels.items()) <= budget
        assert choice.error == math.fsum(errors[name][level] for name, level in choice.levels.items())
        assert choice.bound <= right + 1e-9
        assert list(choice.levels) == list(costs)
    assert best.error <= hull.error
    ordered = levels_in_order(list(costs), costs, sizes, budget / total)
    assert best.error <= math.fsum(errors[name][level] for name, level in ordered.items()) + 1e-9


@settings(deadline=None, max_examples=100)
@given(problems(), st.floats(0, 1), st.integers(1, 3))
def test_where_states_are_cut_the_bound_still_holds(problem, share, states):
    errors, costs, sizes = problem
    total = sum(sizes.values())
    least, most = (sum(pick(of.values()) for of in costs.values()) for pick in (min, max))
    budget = round(least + (most - least) * share)
    kept = least_error.MOST_STATES
    try:
        least_error.MOST_STATES = states
        best = least_error_levels(errors, costs, sizes, budget / total)
    finally:
        least_error.MOST_STATES = kept
    right = brute(errors, costs, budget)
    assert best.bound <= right + 1e-9
    assert right <= best.error + 1e-9
    assert best.error <= hull_levels(errors, costs, sizes, budget / total).error
