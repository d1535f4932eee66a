"""Hulls: the worked optimum, the budget within one unit, and brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import equal_slope, hull_counts, smoothed, stencil_slopes
from layerwise.errors import BudgetError, ConfigError, ScoreError


def quadratics(units):
    return {
        "a": [3 * (k / units) ** 2 for k in range(units + 1)],
        "b": [4 * (k / units) ** 2 for k in range(units + 1)],
    }


def test_the_optimum_worked_by_hand():
    """D = (3 a^2, 4 a^2), MACs (1, 3), half stays: slope per cost 1.54839."""
    units = 2000
    curves, saves = quadratics(units), {"a": 1 / units, "b": 3 / units}
    gone = {name: count / units for name, count in hull_counts(curves, saves, 2.0).items()}
    assert gone == pytest.approx({"a": 0.25806, "b": 0.58065}, abs=2e-3)
    assert 3 * gone["a"] ** 2 + 4 * gone["b"] ** 2 == pytest.approx(1.54839, abs=2e-3)
    assert 6 * gone["a"] == pytest.approx(1.54839, abs=1e-2)


def test_equal_slopes_worked_by_hand():
    curves, costs = quadratics(4000), {"a": 1.0, "b": 3.0}
    close = {"tolerance": 1e-3, "min_kept": 0.0}
    gone = equal_slope(curves, costs, 0.5, **close)
    assert gone == pytest.approx({"a": 0.61538, "b": 0.46154}, abs=2e-3)
    assert 3 * gone["a"] ** 2 + 4 * gone["b"] ** 2 == pytest.approx(1.98817, abs=1e-2)
    powered = {"power": {"a": 1.0, "b": 3.0}, "beta": 0.5}
    code = equal_slope(curves, costs, 0.5, **close, **powered)
    assert code == pytest.approx({"a": 0.73077, "b": 0.42308}, abs=2e-3)
    right = equal_slope(curves, costs, 0.5, **close, **powered, survivors=True)
    assert right == pytest.approx({"a": 0.5, "b": 0.5}, abs=2e-3)


def test_power_as_a_part_of_the_worth_is_the_corrected_sign():
    """With slope lambda * MACs + beta * power, as blocks that stay cost both."""
    units, slope, beta = 2000, 1.0, 0.5
    curves, saves = quadratics(units), {"a": 1 / units, "b": 3 / units}
    worth = {"a": (slope * 1 + beta * 5) / units, "b": (slope * 3 + beta * 1) / units}
    gone = {name: count / units for name, count in hull_counts(curves, saves, 2.0, worth=worth).items()}
    scale = 6 * gone["a"] / (slope + 5 * beta)
    assert 8 * gone["b"] == pytest.approx(scale * (3 * slope + beta), rel=1e-2)
    assert gone["a"] > 0.25806 + 0.05  # a is power-hungry, so more of it goes


def test_the_stencil_of_the_code_is_wrong_where_it_is_cut_short():
    line = [3 * i / 100 for i in range(101)]
    slopes = stencil_slopes(line, 0.01, 4)
    assert len(slopes) == 100
    assert [slopes[3], slopes[97]] == pytest.approx([1.6667, 1.6667], abs=1e-4)
    assert [value for i, value in enumerate(slopes) if i not in (3, 97)] == pytest.approx([3.0] * 98)
    slopes = stencil_slopes(line, 0.01, 10)
    assert [slopes[i] for i in (3, 5, 7, 9)] == pytest.approx([1.6667, 2.2, 2.4286, 2.5556], abs=1e-4)


def test_smoothing_makes_up_for_its_start():
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 4.0], 0.5) == pytest.approx([1.0, 3.0])  # (0.5 * 0.5 + 0.5 * 4) / 0.75
    with pytest.raises(ConfigError, match="weight=1"):
        smoothed([1.0], 1.0)


def test_no_slope_within_the_tolerance_is_said():
    flat = {"a": [0.0] * 101, "b": [0.0] * 101}
    with pytest.raises(BudgetError, match="equal slopes keep"):
        equal_slope(flat, {"a": 1.0, "b": 1.0}, 0.5)


problems = st.lists(
    st.tuples(st.lists(st.floats(0, 10), min_size=1, max_size=4), st.integers(1, 5)), min_size=1, max_size=4
)


def built(problem):
    curves = {str(i): [0.0, *itertools.accumulate(steps)] for i, (steps, _) in enumerate(problem)}
    return curves, {str(i): float(cost) for i, (_, cost) in enumerate(problem)}


@settings(deadline=None, max_examples=200)
@given(problems, st.floats(0, 1))
def test_the_budget_holds_and_no_unit_can_be_put_back(problem, share):
    curves, saves = built(problem)
    wanted = share * sum(saves[name] * (len(curve) - 1) for name, curve in curves.items())
    counts = hull_counts(curves, saves, wanted)
    saved = sum(saves[name] * count for name, count in counts.items())
    assert all(0 <= counts[name] < len(curves[name]) for name in curves)
    assert saved >= wanted - 1e-6
    assert all(saved - saves[name] < wanted for name, count in counts.items() if count)


def least(curves, saves, wanted):
    """By trying everything."""
    return min(
        sum(curves[name][k] for name, k in zip(curves, choice))
        for choice in itertools.product(*(range(len(curve)) for curve in curves.values()))
        if sum(saves[name] * k for name, k in zip(curves, choice)) >= wanted
    )


@settings(deadline=None, max_examples=200)
@given(problems, st.integers(0, 60))
def test_near_the_least_of_all_choices(problem, wanted):
    """Above it by less than what one edge of a hull, taken in part, may cost."""
    curves, saves = built(problem)
    wanted = min(wanted, sum(saves[name] * (len(curve) - 1) for name, curve in curves.items()))
    counts = hull_counts(curves, saves, wanted)
    total = sum(curves[name][count] for name, count in counts.items())
    best = least(curves, saves, wanted)
    assert best - 1e-9 <= total <= best + max(curve[-1] for curve in curves.values()) + 1e-9


@settings(deadline=None, max_examples=200)
@given(problems, st.integers(0, 16))
def test_the_least_of_all_choices_where_curves_are_convex_and_costs_alike(problem, wanted):
    curves, saves = built([(sorted(steps), 1) for steps, _ in problem])
    wanted = min(wanted, sum(len(curve) - 1 for curve in curves.values()))
    counts = hull_counts(curves, saves, wanted)
    total = sum(curves[name][count] for name, count in counts.items())
    assert total == pytest.approx(least(curves, saves, wanted))


@settings(deadline=None, max_examples=100)
@given(problems, st.floats(0, 1), st.randoms())
def test_floors_and_caps_hold(problem, share, random):
    curves, saves = built(problem)
    low = {name: random.randint(0, len(curve) - 1) for name, curve in curves.items()}
    high = {name: random.randint(low[name], len(curve) - 1) for name, curve in curves.items()}
    wanted = share * sum(saves[name] * high[name] for name in curves)
    counts = hull_counts(curves, saves, wanted, low=low, high=high)
    assert all(low[name] <= counts[name] <= high[name] for name in curves)


def test_a_smaller_budget_takes_no_block_back():
    curves, saves = quadratics(50), {"a": 1.0, "b": 1.0}
    last = {"a": 0, "b": 0}
    for wanted in range(0, 101, 5):
        counts = hull_counts(curves, saves, wanted)
        assert sum(counts.values()) == wanted
        assert all(counts[name] >= last[name] for name in counts)
        last = counts


def test_falling_curves_count_as_level():
    counts = hull_counts({"a": [0, 3, 1, 3.5], "b": [0, 2, 4, 6]}, {"a": 1.0, "b": 1.0}, 3)
    assert counts == {"a": 3, "b": 0}  # after the first of a the others add a little


def test_names_that_save_nothing_lose_nothing():
    assert hull_counts({"a": [0, 0], "b": [0, 9]}, {"a": 0.0, "b": 1.0}, 1) == {"a": 0, "b": 1}


def test_bad_numbers_are_refused():
    with pytest.raises(BudgetError, match=r"can save 2, the target is 3"):
        hull_counts({"a": [0, 1, 2]}, {"a": 1.0}, 3)
    with pytest.raises(ScoreError, match='distortion of "a" is not finite'):
        hull_counts({"a": [0, float("nan")]}, {"a": 1.0}, 1)
    with pytest.raises(ConfigError, match='a unit of "a" saves -1'):
        hull_counts({"a": [0, 1]}, {"a": -1.0}, 1)
    with pytest.raises(ConfigError, match='a unit of "a" is worth 0'):
        hull_counts({"a": [0, 1]}, {"a": 1.0}, 1, worth={"a": 0.0})


@pytest.mark.parametrize(
    ("wanted", "limits", "words"),
    [
        (float("nan"), {}, "wanted=nan: give a finite number"),
        (float("inf"), {}, "wanted=inf: give a finite number"),
        (1, {"high": {"a": 3}}, '"a" has 2 units, of which 0 to 3 may go'),
        (0, {"low": {"a": -1}}, '"a" has 2 units, of which -1 to 2 may go'),
        (0, {"low": {"a": 2}, "high": {"a": 1}}, '"a" has 2 units, of which 2 to 1 may go'),
    ],
)
def test_bad_bounds_are_refused(wanted, limits, words):
    with pytest.raises(ConfigError, match=words):
        hull_counts({"a": [0, 1, 2]}, {"a": 1.0}, wanted, **limits)


def test_equal_slopes_count_whole_blocks():
    """Of 5 blocks a half rounds to 2 or 3, off the budget by 10 %: the curve's hundredths alone would call that met."""
    curves, costs = dict.fromkeys("ab", quadratics(100)["a"]), {"a": 1.0, "b": 1.0}
    assert equal_slope(curves, costs, 0.5) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.02)
    with pytest.raises(BudgetError, match="equal slopes keep"):
        equal_slope(curves, costs, 0.5, blocks={"a": 5, "b": 5})
    gone = equal_slope(curves, costs, 0.4, blocks={"a": 5, "b": 5})
    assert all(round(5 * (1 - one)) == 2 for one in gone.values())
