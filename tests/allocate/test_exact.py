import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import check_feasible, exact_counts, sparsities_of, water_fill
from layerwise.errors import BudgetError, ConfigError
from layerwise.plan import Prune

sizes_of_layers = st.lists(st.integers(1, 10_000), min_size=1, max_size=12).map(
    lambda sizes: {f"l{index}": size for index, size in enumerate(sizes)}
)


def test_largest_remainder_worked_by_hand():
    # exact 3.4, 3.4, 3.2; 10 wanted: 3 + 3 + 3 and one more for the first of the two equal remainders
    sizes = {"a": 4, "b": 4, "c": 4}
    assert exact_counts({"a": 0.85, "b": 0.85, "c": 0.8}, sizes, 10 / 12) == {"a": 4, "b": 3, "c": 3}


def test_ties_follow_the_order_of_the_model_not_of_the_sparsities():
    sizes = {"z": 3, "m": 3, "a": 3}  # 1.5 each, 4.5 -> round half to even: 4
    for order in ("zma", "amz", "maz"):
        assert exact_counts(dict.fromkeys(order, 0.5), sizes, 0.5) == {"z": 2, "m": 1, "a": 1}
    assert list(exact_counts(dict.fromkeys("amz", 0.5), sizes, 0.5)) == ["z", "m", "a"]


def test_a_bound_is_the_decimal_that_was_written():
    sizes = {"a": 100, "b": 100}  # 0.29 * 100 is 28.999999999999996 in floating point
    assert exact_counts({"a": 0.29, "b": 0.29}, {"a": 100, "b": 100}, 0.29, high=0.29) == {"a": 29, "b": 29}
    assert exact_counts({"a": 0.29, "b": 0.5}, sizes, 0.395, high={"a": 0.29, "b": 0.6}) == {"a": 29, "b": 50}
    assert exact_counts({"a": 0.07, "b": 0.07}, {"a": 100, "b": 100}, 0.07, low=0.07) == {"a": 7, "b": 7}


def test_a_cap_moves_the_last_weights_elsewhere():
    # exact 7.5 and 2.5, cap 7: the zero goes to b
    assert exact_counts({"a": 0.75, "b": 0.25}, {"a": 10, "b": 10}, 0.5, high=0.75) == {"a": 7, "b": 3}


def test_a_cap_gives_way_by_part_of_a_weight_only_where_nothing_else_does():
    sizes = {"a": 5, "b": 5}  # 3.5 each; 7 zeros cannot be had with at most 3 in each
    assert exact_counts({"a": 0.7, "b": 0.7}, sizes, 0.7, high=0.7) == {"a": 4, "b": 3}
    assert exact_counts({"a": 0.7, "b": 0.7}, sizes, 0.7, low=0.7) == {"a": 4, "b": 3}


def test_what_is_feasible_is_said():
    sizes = {f"b{index}": 100 for index in range(32)}
    caps = dict.fromkeys(sizes, 0.75) | {f"b{index}": 0.0 for index in range(4)}
    with pytest.raises(BudgetError) as caught:
        check_feasible(sizes, 0.7, 0.0, caps)
    text = "65.62 % can go (max_sparsity=0.75, 4 of 32 layers stay dense), target 70 %. Raise max_sparsity to 0.8."
    assert str(caught.value) == text
    check_feasible(sizes, 0.7, 0.0, dict.fromkeys(sizes, 0.8) | {f"b{index}": 0.0 for index in range(4)})


def test_what_is_feasible_when_no_cap_would_do():
    sizes = {"a": 60, "b": 40}
    with pytest.raises(BudgetError) as caught:
        check_feasible(sizes, 0.7, 0.0, {"a": 0.5, "b": 0.0})
    assert str(caught.value) == (
        "30 % can go (max_sparsity=0.5, 1 of 2 layers stay dense), target 70 %. Lower the sparsity to 0.6, or let fewer layers stay dense."
    )
    with pytest.raises(
        BudgetError, match=r"at least 30 % must go \(min_sparsity=0.3\), target 20 %. Lower min_sparsity to 0.2"
    ):
        check_feasible(sizes, 0.2, 0.3)
    with pytest.raises(
        BudgetError,
        match=r"^0 % can go \(max_sparsity=0, 2 of 2 layers stay dense\), target 10 %. Lower the sparsity to 0,",
    ):
        check_feasible(sizes, 0.1, 0.0, 0.0)


@pytest.mark.parametrize("sparsity", [-0.1, 1.2, math.nan])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(ConfigError, match="0 <= sparsity <= 1"):
        check_feasible({"a": 10}, sparsity)


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match=r'"a": bounds 0\.6 to 0\.4'):
        check_feasible({"a": 10}, 0.5, 0.6, 0.4)


def test_sparsities_that_do_not_amount_to_the_target_are_refused():
    with pytest.raises(BudgetError, match=r"amount to 100 zeros of 200, the target 0\.7 to 140"):
        exact_counts({"a": 0.5, "b": 0.5}, {"a": 100, "b": 100}, 0.7)
    with pytest.raises(BudgetError, match="amount to nan"):
        exact_counts({"a": math.nan}, {"a": 100}, 0.7)
    with pytest.raises(ConfigError, match='different layers, such as "b"'):
        exact_counts({"a": 0.5}, {"a": 100, "b": 100}, 0.5)


@settings(deadline=None)
@given(sizes_of_layers, st.floats(0, 1), st.data())
def test_budgets_are_met_exactly_for_any_sizes_and_caps(sizes, sparsity, data):
    low = data.draw(st.floats(0, sparsity))
    high = data.draw(st.floats(sparsity, 1))
    shares = {name: data.draw(st.floats(-2, 2)) for name in sizes}
    total = sum(sizes.values())
    filled = water_fill(shares, sizes, sparsity * total, low, high)
    counts = exact_counts(filled, sizes, sparsity, low, high)
    assert sum(counts.values()) == round(sparsity * total)
    assert list(counts) == list(sizes)
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert low * size - 1 < counts[name] < high * size + 1
        assert abs(counts[name] - filled[name] * size) < len(sizes) + 1


@settings(deadline=None)
@given(sizes_of_layers, st.floats(0.1, 0.9), st.data())
def test_counts_stay_inside_caps_that_leave_room(sizes, sparsity, data):
    low, high = sparsity / 2, (1 + sparsity) / 2
    sizes = {name: size + 1000 for name, size in sizes.items()}  # more room than there are layers to round
    shares = {name: data.draw(st.floats(-2, 2)) for name in sizes}
    total = sum(sizes.values())
    counts = exact_counts(water_fill(shares, sizes, sparsity * total, low, high), sizes, sparsity, low, high)
    assert sum(counts.values()) == round(sparsity * total)
    assert all(math.ceil(low * size) <= counts[name] <= math.floor(high * size) for name, size in sizes.items())


@settings(deadline=None)
@given(st.integers(1, 2**40), st.data())
def test_a_count_survives_as_a_sparsity_written_as_text(size, data):
    count = data.draw(st.integers(0, size))
    sparsity = float(repr(sparsities_of({"a": count}, {"a": size})["a"]))
    assert Prune(sparsity=sparsity).zeros(size, 1, size) == count


def test_an_empty_layer_has_sparsity_zero():
    assert exact_counts({"a": 0.5, "b": 0.5}, {"a": 0, "b": 2}, 0.5) == {"a": 0, "b": 1}
    assert sparsities_of({"a": 0}, {"a": 0}) == {"a": 0.0}


@settings(deadline=None)
@given(sizes_of_layers, st.floats(0, 1), st.randoms(use_true_random=False))
def test_counts_follow_their_layers_when_the_model_is_reordered(sizes, sparsity, random):
    """Up to ties: of equal remainders the first in the model keeps the zero, so distinct sizes are compared."""
    sizes = {name: size * 16 + index for index, (name, size) in enumerate(sizes.items())}
    sizes = {name: size for name, size in sizes.items() if list(sizes.values()).count(size) == 1}
    if not sizes:
        return
    fractions = [sparsity * size % 1 for size in sizes.values()]
    if min((abs(a - b) for i, a in enumerate(fractions) for b in fractions[:i]), default=1) < 1e-6:
        return
    names = list(sizes)
    random.shuffle(names)
    even = dict.fromkeys(sizes, sparsity)
    assert exact_counts(even, {name: sizes[name] for name in names}, sparsity) == exact_counts(even, sizes, sparsity)


@settings(deadline=None)
@given(st.integers(1, 50), st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(0, 1))
def test_of_layers_of_one_size_the_higher_sparsity_never_loses_less(size, shares, sparsity):
    sizes = {f"l{index}": size for index in range(len(shares))}
    filled = water_fill(dict(zip(sizes, shares)), sizes, sparsity * size * len(shares))
    counts = exact_counts(filled, sizes, sparsity)
    names = sorted(filled, key=filled.__getitem__)
    assert all(counts[a] <= counts[b] for a, b in itertools.pairwise(names) if filled[a] < filled[b])
