import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import exact_counts, proportional
from layerwise.errors import BudgetError, ConfigError, ScoreError


def kept(scores, sizes, sparsity, high, low=0.0):
    """Whole weights kept of each group."""
    scores = {f"g{index}": score for index, score in enumerate(scores)}
    sizes = {f"g{index}": size for index, size in enumerate(sizes)}
    shares = proportional(scores, sizes, sparsity, low, high)
    zeros = exact_counts(shares, sizes, sparsity, low, high)
    return [sizes[name] - zeros[name] for name in sizes]


@pytest.mark.parametrize(
    ("scores", "sizes", "sparsity", "high", "expected"),
    [
        ([1, 1, 1], [100, 300, 200], 0.5, 0.6, [60, 140, 100]),  # floors 40, 120, 80 and 20 each
        ([1, 1, 98], [100, 100, 100], 0.5, 0.8, [25, 25, 100]),  # the last is full
        (
            [1, 2, 5],
            [100, 100, 100],
            0.5,
            0.6,
            [44, 47, 59],
        ),  # 43.75, 47.5, 58.75; the release gives 44, 48, 60, sum 152
        ([0, 1, 1], [100, 100, 100], 0.5, 0.6, [40, 55, 55]),
        ([4, 1, 1, 2], [10**6, 4 * 10**6, 2 * 10**6, 10**6], 0.5, 0.6, [800_000, 1_700_000, 900_000, 600_000]),
    ],
)
def test_worked_by_hand(scores, sizes, sparsity, high, expected):
    assert kept(scores, sizes, sparsity, high) == expected


def test_fractions_worked_by_hand():
    shares = proportional({"a": 1, "b": 1, "c": 1}, {"a": 100, "b": 300, "c": 200}, 0.5, high=0.6)
    assert shares == pytest.approx({"a": 0.4, "b": 160 / 300, "c": 0.5})
    names, sizes = "abcd", (10**6, 4 * 10**6, 2 * 10**6, 10**6)
    shares = proportional(dict(zip(names, (4, 1, 1, 2))), dict(zip(names, sizes)), 0.5, high=0.6)
    assert list(shares.values()) == pytest.approx([0.2, 0.575, 0.55, 0.4])


def test_a_score_of_zero_gets_what_full_groups_leave():
    """The official loop never ends here: the only group with a score is full, and weights are left."""
    assert kept([0, 0, 1], [100, 100, 100], 0.5, 0.8) == [25, 25, 100]
    assert kept([0, 0, 1], [100, 20, 100], 0.4, 1.0) == [16, 16, 100]  # evenly by count
    assert kept([0, 0, 0], [100, 300, 200], 0.5, 0.6) == kept([1, 1, 1], [100, 300, 200], 0.5, 0.6)


def test_a_lower_bound_fills_a_group_before_it_is_dense():
    assert kept([1, 1, 98], [100, 100, 100], 0.5, 0.8, low=0.2) == [35, 35, 80]


def test_the_loop_of_the_official_code_ends_in_the_same_place():
    """Its floors, rounds and clamps in exact numbers, without its rounding up."""
    scores, sizes, sparsity, cap = [3.0, 40, 1, 9, 2], [100, 50, 400, 120, 80], 0.6, 0.75
    keep = [size * (1 - cap) for size in sizes]
    budget, left = sum(sizes) * (1 - sparsity), list(scores)
    while budget - sum(keep) > 1e-9:
        rest, total = budget - sum(keep), sum(left)
        keep = [min(size, k + score / total * rest) for size, k, score in zip(sizes, keep, left)]
        left = [0 if k >= size else score for size, k, score in zip(sizes, keep, left)]
    got = proportional(
        {str(i): one for i, one in enumerate(scores)}, {str(i): one for i, one in enumerate(sizes)}, sparsity, high=cap
    )
    assert list(got.values()) == pytest.approx([1 - k / size for size, k in zip(sizes, keep)])
    assert min(got.values()) == 0  # a round was needed


groups = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), st.integers(1, 10**7)), min_size=1, max_size=8
)


@settings(deadline=None)
@given(groups, st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_the_budget_is_met_whatever_the_scores(rows, sparsity, slack, factor, random):
    high = sparsity + slack * (1 - sparsity)
    scores = {str(i): score for i, (score, _) in enumerate(rows)}
    sizes = {str(i): size for i, (_, size) in enumerate(rows)}
    shares = proportional(scores, sizes, sparsity, high=high)
    total = sum(sizes.values())
    assert math.fsum(shares[name] * sizes[name] for name in sizes) == pytest.approx(sparsity * total, abs=1e-6 * total)
    assert all(-1e-9 <= share <= high + 1e-9 for share in shares.values())
    zeros = exact_counts({n: min(1, max(0, s)) for n, s in shares.items()}, sizes, sparsity, 0.0, 1.0)
    assert sum(zeros.values()) == round(sparsity * total)
    scaled = proportional({name: score * factor for name, score in scores.items()}, sizes, sparsity, high=high)
    assert scaled == pytest.approx(shares, abs=1e-6)
    order = list(scores)
    random.shuffle(order)
    again = proportional(
        {name: scores[name] for name in order}, {name: sizes[name] for name in order}, sparsity, high=high
    )
    assert again == pytest.approx(shares, abs=1e-9)


@given(groups, st.floats(0, 1))
def test_without_room_between_target_and_cap_all_are_equal(rows, sparsity):
    sizes = {str(i): size for i, (_, size) in enumerate(rows)}
    scores = {str(i): score for i, (score, _) in enumerate(rows)}
    assert proportional(scores, sizes, sparsity, high=sparsity) == pytest.approx(
        dict.fromkeys(sizes, sparsity), abs=1e-6
    )


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8), st.floats(0.1, 0.9))
def test_of_groups_of_one_size_the_higher_score_keeps_more(values, sparsity):
    scores = {str(i): value for i, value in enumerate(values)}
    shares = proportional(scores, dict.fromkeys(scores, 1000), sparsity, high=min(1, sparsity + 0.1))
    for a in scores:
        for b in scores:
            if scores[a] > scores[b]:
                assert shares[a] <= shares[b] + 1e-9


def test_bad_input_is_one_line():
    sizes = {"a": 10, "b": 10}
    for score in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ScoreError, match='score of "a" is'):
            proportional({"a": score, "b": 1.0}, sizes, 0.5)
    with pytest.raises(ConfigError, match='different groups, such as "b"'):
        proportional({"a": 1.0}, sizes, 0.5)
    with pytest.raises(BudgetError, match=r"Raise max_sparsity to 0\.5"):
        proportional({"a": 1.0, "b": 1.0}, sizes, 0.5, high=0.4)


def test_an_empty_group_takes_no_part():
    got = proportional({"a": 1.0, "b": 5.0}, {"a": 10, "b": 0}, 0.5)
    assert got["a"] == pytest.approx(0.5)
