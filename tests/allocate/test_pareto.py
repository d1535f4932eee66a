"""Fronts: the worked example, ties, and sums against every combination there is."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import additive_front, pareto_front

ERRORS = {
    (8, 8): 0.010, (8, 4): 0.080, (4, 8): 0.200, (8, 2): 0.420, (2, 8): 0.900,
    (4, 4): 0.210, (4, 2): 0.450, (2, 4): 0.920, (2, 2): 0.960,
}  # fmt: skip


def points(errors):
    return {pair: (sum(pair) / 2, error) for pair, error in errors.items()}


def test_the_usual_five_pairs_survive_and_a_sixth_where_it_is_better():
    assert pareto_front(points(ERRORS)) == [(2, 2), (4, 2), (4, 4), (8, 4), (8, 8)]
    assert pareto_front(points(ERRORS | {(8, 2): 0.15})) == [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]


def test_an_error_that_is_not_monotone_drops_pairs_of_more_bits():
    assert pareto_front(points(ERRORS | {(2, 2): 0.05})) == [(2, 2), (8, 8)]


def test_of_equal_points_the_first_stays():
    assert pareto_front({"a": (1, 2), "b": (1, 2), "c": (1, 3), "d": (2, 2)}) == ["a"]
    assert pareto_front({"d": (2, 2), "b": (1, 2), "a": (1, 2)}) == ["b"]
    assert pareto_front({}) == []


small = st.dictionaries(st.integers(0, 6), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5)


@given(small)
def test_nothing_on_the_front_is_beaten_and_everything_else_is(found):
    front = pareto_front(found)

    def beaten(one):
        return any(a <= found[one][0] and b <= found[one][1] and (a, b) != found[one] for a, b in found.values())

    assert all(not beaten(one) for one in front)
    assert {found[one] for one in found if not beaten(one)} == {found[one] for one in front}
    assert len({found[one] for one in front}) == len(front)


@settings(max_examples=50)
@given(st.lists(small, min_size=1, max_size=4))
def test_sums_are_the_front_of_all_combinations(parts):
    everything = {
        choices: (
            sum(part[c][0] for part, c in zip(parts, choices)),
            sum(part[c][1] for part, c in zip(parts, choices)),
        )
        for choices in product(*parts)
    }
    front = additive_front(parts)
    assert [(one.cost, one.error) for one in front] == [everything[one] for one in pareto_front(everything)]
    assert all(everything[one.choices] == (one.cost, one.error) for one in front)


def test_for_every_budget_the_best_sum_is_there():
    parts = [{pair: (sum(pair), error * weight) for pair, error in ERRORS.items()} for weight in (1, 3, 0.5, 2)]
    front = additive_front(parts)
    for cap in range(16, 65):
        best = min(
            sum(part[c][1] for part, c in zip(parts, choices))
            for choices in product(ERRORS, repeat=4)
            if sum(map(sum, choices)) <= cap
        ) if cap in (16, 21, 33, 64) else None  # fmt: skip
        if best is not None:
            assert [one for one in front if one.cost <= cap][-1].error == pytest.approx(best)
