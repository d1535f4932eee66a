"""Adapt-Pruner's schedule in worked numbers, and that no share of heads is lost in rounding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocate.adaptive import (
    channels_left,
    heads_left,
    heads_shared,
    next_sparsities,
    scaled_importance,
)

IMPORTANCES = dict(zip("abcd", (-0.60, -0.90, -0.98, -0.80), strict=True))  # minus the cosines of check 1


def run(importances, steps, base=0.02, amplitude=0.02):
    scaled, s = scaled_importance(importances), dict.fromkeys(importances, 0.0)
    for _ in range(steps):
        s = next_sparsities(s, scaled, base, amplitude)
    return s


def test_check_1():
    scaled = scaled_importance(IMPORTANCES)
    assert [*scaled.values()] == pytest.approx([1, -0.363636, -0.727273, 0.090909], abs=1e-6)
    assert [*run(IMPORTANCES, 1).values()] == pytest.approx([0, 0.027273, 0.034545, 0.018182], abs=1e-6)
    after = run(IMPORTANCES, 10)
    assert [*after.values()] == pytest.approx([0, 0.272727, 0.345455, 0.181818], abs=1e-6)
    assert sum(after.values()) / 4 == pytest.approx(0.2)
    assert [channels_left(100, s) for s in after.values()] == [100, 72, 65, 81]
    assert [heads_left(5, s, 8) for s in after.values()] == [5, 4, 4, 4]


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_check_2_scaling_changes_nothing(values, a, b):
    before = dict(enumerate(values))
    if max(values) - min(values) < 1e-3:
        return
    one, other = scaled_importance(before), scaled_importance({name: a * v + b for name, v in before.items()})
    assert [*one.values()] == pytest.approx([*other.values()], abs=1e-6)
    assert sum(one.values()) == pytest.approx(0, abs=1e-9)
    s = run(before, 3)
    assert sum(s.values()) / len(s) == pytest.approx(0.06)  # nothing is clipped while amplitude <= base


def test_check_2_alike_is_uniform():
    assert scaled_importance({"a": -0.9, "b": -0.9}) == {"a": 0.0, "b": 0.0}
    assert run({"a": -0.9, "b": -0.9}, 5) == pytest.approx({"a": 0.1, "b": 0.1})


@pytest.mark.parametrize(
    ("start", "size", "sparsity", "gone"),
    [
        (5, 64, 0.19, 0), (5, 64, 0.20, 1), (5, 64, 0.39, 1), (5, 64, 0.40, 2),
        (8, 128, 0.12, 0), (8, 128, 0.125, 1), (8, 128, 0.25, 2), (2, 64, 0.40, 0), (2, 64, 0.50, 1),
    ],
)  # fmt: skip
def test_check_3_thresholds_of_heads(start, size, sparsity, gone):
    assert start - heads_left(start, sparsity, size) == gone


def test_steps_that_add_up_shift_no_boundary():
    s = {"a": 0.0}
    for _ in range(10):
        s = next_sparsities(s, {"a": 0.0}, 0.02, 0.02)
    assert heads_left(5, s["a"], 64) == 4
    assert channels_left(50, s["a"]) == 40


def test_ranks_are_not_flattened_by_one_block():
    found = scaled_importance({"a": -0.1, "b": -0.98, "c": -0.99, "d": -0.97}, "rank")
    assert found == pytest.approx({"a": 1.0, "b": -1 / 3, "c": -1.0, "d": 1 / 3})


def test_heads_of_all_blocks_share_what_rounding_would_lose():
    """24 blocks of two key heads at a fifth each: rounded alone none goes, together 9.6 heads, so nine."""
    starts, shares = ({f"{i}": 2 for i in range(24)}, {f"{i}": 0.2 + i / 1000 for i in range(24)})
    alone = [heads_left(2, s, 64) for s in shares.values()]
    assert sum(alone) == 48
    left = heads_shared(starts, shares, starts)
    assert sum(left.values()) == 48 - int(sum(2 * s for s in shares.values()))
    assert [left[f"{i}"] for i in range(23, 20, -1)] == [1, 1, 1]  # those that were to lose most


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0, 0.99)), min_size=1, max_size=10), st.floats(0, 1))
def test_heads_never_come_back_and_one_stays(groups, share):
    starts = {i: units for i, (units, _) in enumerate(groups)}
    early = heads_shared(starts, {i: s * share for i, (_, s) in enumerate(groups)}, starts)
    late = heads_shared(starts, {i: s for i, (_, s) in enumerate(groups)}, early)
    assert all(1 <= late[name] <= early[name] <= starts[name] for name in starts)
    assert sum(starts.values()) - sum(late.values()) <= sum(units * s for units, s in groups) + 1e-6 or late == early
