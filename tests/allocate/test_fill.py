import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import linear_map, water_fill
from layerwise.errors import BudgetError, ConfigError, ScoreError


@st.composite
def problems(draw, negative):
    """Shares, sizes, bounds per layer, and a total between them."""
    count = draw(st.integers(1, 10))
    names = [f"l{index}" for index in range(count)]
    shares = {name: draw(st.floats(-3 if negative else 1e-3, 3)) for name in names}
    sizes = {name: draw(st.integers(1, 1000)) for name in names}
    low = {name: draw(st.floats(0, 0.5)) for name in names}
    high = {name: draw(st.floats(0.5, 1)) for name in names}
    least, most = (math.fsum(bound[name] * sizes[name] for name in names) for bound in (low, high))
    total = least + draw(st.floats(0, 1)) * (most - least)
    return shares, sizes, total, low, high


def weight(shares, sizes):
    return math.fsum(shares[name] * sizes[name] for name in sizes)


def test_shift_worked_by_hand():
    # .9 and .5 of equal sizes, mean .8, cap .9: a stays at its cap, b rises by .2
    got = water_fill({"a": 0.9, "b": 0.5}, {"a": 10, "b": 10}, 16, 0.0, 0.9)
    assert got == pytest.approx({"a": 0.9, "b": 0.7})


def test_scale_worked_by_hand():
    # 2 : 1 : 1 of sizes 10, 10, 20 and a total of 28: a is full at 1, b and c share 18 over 30
    got = water_fill({"a": 2, "b": 1, "c": 1}, {"a": 10, "b": 10, "c": 20}, 28, by="scale")
    assert got == pytest.approx({"a": 1.0, "b": 0.6, "c": 0.6})


def test_shares_that_fit_stay_as_they_are():
    shares = {"a": 0.25, "b": 0.75}
    assert water_fill(shares, {"a": 4, "b": 4}, 4) == pytest.approx(shares, abs=1e-15)
    assert water_fill(shares, {"a": 4, "b": 4}, 4, by="scale") == pytest.approx(shares, abs=1e-15)


def test_a_share_of_zero_cannot_be_scaled_up():
    assert water_fill({"a": 0, "b": 1}, {"a": 10, "b": 10}, 5, by="scale") == {"a": 0.0, "b": 0.5}
    with pytest.raises(BudgetError, match="hold 0 to 10 of 20 weights, not the total of 12"):
        water_fill({"a": 0, "b": 1}, {"a": 10, "b": 10}, 12, by="scale")
    assert water_fill({"a": 0}, {"a": 10}, 0, by="scale") == {"a": 0}


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(BudgetError, match="hold 2 to 15 of 20 weights, not the total of 16"):
        water_fill({"a": 1, "b": 2}, {"a": 10, "b": 10}, 16, 0.1, 0.75)
    with pytest.raises(ScoreError, match='the share of "a" is nan'):
        water_fill({"a": math.nan}, {"a": 10}, 5)
    with pytest.raises(ScoreError, match="at least 0 to scale"):
        water_fill({"a": -1}, {"a": 10}, 5, by="scale")
    with pytest.raises(ConfigError, match="different layers"):
        water_fill({"a": 1}, {"b": 10}, 5)


@settings(deadline=None)
@given(problems(negative=True))
def test_shift_meets_the_total_within_the_bounds_and_moves_all_alike(problem):
    shares, sizes, total, low, high = problem
    got = water_fill(shares, sizes, total, low, high)
    assert weight(got, sizes) == pytest.approx(total, rel=1e-9, abs=1e-9 * sum(sizes.values()))
    assert all(low[name] <= got[name] <= high[name] for name in sizes)
    moved = [got[name] - shares[name] for name in sizes if low[name] < got[name] < high[name]]
    assert all(shift == pytest.approx(moved[0], abs=1e-9) for shift in moved)
    for name in sizes:  # a layer at a bound would be beyond it, had it moved like the others
        if moved and got[name] == low[name] < high[name]:
            assert shares[name] + moved[0] <= low[name] + 1e-9
        if moved and got[name] == high[name] > low[name]:
            assert shares[name] + moved[0] >= high[name] - 1e-9


@settings(deadline=None)
@given(problems(negative=False))
def test_scale_meets_the_total_within_the_bounds_and_scales_all_alike(problem):
    shares, sizes, total, low, high = problem
    got = water_fill(shares, sizes, total, low, high, by="scale")
    assert weight(got, sizes) == pytest.approx(total, rel=1e-9, abs=1e-9 * sum(sizes.values()))
    assert all(low[name] <= got[name] <= high[name] for name in sizes)
    factors = [got[name] / shares[name] for name in sizes if low[name] < got[name] < high[name]]
    assert all(factor == pytest.approx(factors[0], rel=1e-6) for factor in factors)


@settings(deadline=None)
@given(problems(negative=False), st.sampled_from(["shift", "scale"]))
def test_more_share_never_gets_less_and_more_total_never_takes_away(problem, by):
    shares, sizes, total, _, _ = problem
    total = min(total, sum(sizes.values()))
    got = water_fill(shares, sizes, total, by=by)
    names = sorted(shares, key=shares.__getitem__)
    assert all(got[a] <= got[b] for a, b in itertools.pairwise(names))
    more = water_fill(shares, sizes, (total + sum(sizes.values())) / 2, by=by)
    assert all(more[name] >= got[name] - 1e-12 for name in names)


@settings(deadline=None)
@given(problems(negative=True), st.randoms(use_true_random=False))
def test_layers_keep_their_share_when_reordered(problem, random):
    shares, sizes, total, low, high = problem
    names = list(sizes)
    random.shuffle(names)
    again = water_fill({n: shares[n] for n in names}, {n: sizes[n] for n in names[::-1]}, total, low, high)
    assert again == pytest.approx(water_fill(shares, sizes, total, low, high), abs=1e-12)


def test_linear_map_worked_by_hand():  # extra = .16, .04, 0 and its mean .066667
    got = linear_map({"a": 10, "b": 4, "c": 2}, {"a": 1, "b": 1, "c": 1}, sparsity=0.7, spread=0.08)
    assert got == pytest.approx({"a": 0.606667, "b": 0.726667, "c": 0.766667}, abs=1e-6)


def test_linear_map_weighs_by_size():
    # extra .2 and 0; sizes 1 and 3: mean .05
    got = linear_map({"a": 1, "b": 0}, {"a": 1, "b": 3}, sparsity=0.5, spread=0.1)
    assert got == pytest.approx({"a": 0.35, "b": 0.55})


def test_equal_scores_get_the_same_sparsity():
    assert linear_map({"a": 3, "b": 3}, {"a": 1, "b": 9}, 0.7, 0.08) == {"a": 0.7, "b": 0.7}


def test_linear_map_refuses_what_is_not_finite():
    with pytest.raises(ScoreError, match='the score of "b" is inf'):
        linear_map({"a": 3, "b": math.inf}, {"a": 1, "b": 9}, 0.7, 0.08)
    with pytest.raises(ConfigError, match="different layers"):
        linear_map({"a": 3}, {"a": 1, "b": 9}, 0.7, 0.08)


scores = st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 10_000)), min_size=1, max_size=12)


@settings(deadline=None)
@given(scores, st.floats(0, 1), st.floats(0, 0.3), st.randoms(use_true_random=False))
def test_linear_map_is_monotone_spans_its_width_and_keeps_the_mean(pairs, sparsity, spread, random):
    values = {f"l{index}": score for index, (score, _) in enumerate(pairs)}
    sizes = {f"l{index}": size for index, (_, size) in enumerate(pairs)}
    got = linear_map(values, sizes, sparsity, spread)
    assert weight(got, sizes) / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-12)
    names = sorted(values, key=values.__getitem__)
    assert all(got[a] >= got[b] for a, b in itertools.pairwise(names))
    if values[names[0]] < values[names[-1]]:
        assert got[names[0]] - got[names[-1]] == pytest.approx(2 * spread, abs=1e-12)
    random.shuffle(names)
    assert linear_map({n: values[n] for n in names}, sizes, sparsity, spread) == got
