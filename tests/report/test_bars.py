"""Bar charts as text: lengths worked by hand, and no line ever wider than asked."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ConfigError
from layerwise.report import bar_chart


def test_lengths_worked_by_hand():
    """20 characters: 1 label, 3 value, 2 spaces, so 14 for the bar; 0.75 of it is 10.5 = ten full and four eighths."""
    assert bar_chart({"a": 4, "b": 3, "c": 0}, 20, form=".1f").splitlines() == [
        "a ██████████████ 4.0",
        "b ██████████▌    3.0",
        "c                0.0",
    ]
    assert bar_chart({"a": 4, "b": 3}, 20, form=".1f", ascii_only=True).splitlines()[1] == "b ##########     3.0"


def test_a_full_bar_can_be_fixed_and_small_values_are_seen():
    assert bar_chart({"a": 0.5}, 17, form=".0%", maximum=1) == "a █████▌      50%"
    assert "▏" in bar_chart({"a": 1, "b": 1e-9}, 40)


def test_narrow_terminals_lose_bars_then_the_starts_of_labels():
    values = {"model.layers.0": 0.5, "model.layers.1": 0.25}
    assert bar_chart(values, 24, form=".0%").splitlines()[0] == "…layers.0 ██████████ 50%"
    assert bar_chart(values, 9, form=".0%").splitlines() == ["…rs.0 50%", "…rs.1 25%"]
    assert bar_chart(values, 9, form=".0%", ascii_only=True).splitlines()[0] == "~rs.0 50%"


def test_what_is_not_a_number_has_no_bar():
    assert bar_chart({"a": float("nan"), "b": 1.0, "c": float("inf")}, 20, form=".0f").splitlines() == [
        "a                nan",
        "b ██████████████   1",
        "c                inf",
    ]


def test_nothing_and_nonsense():
    assert bar_chart({}, 10) == ""
    with pytest.raises(ConfigError, match="values must be 0 or more"):
        bar_chart({"a": -1}, 10)
    with pytest.raises(ConfigError, match="width at least 1"):
        bar_chart({"a": 1}, 0)


letters = st.characters(min_codepoint=33, max_codepoint=126)


@given(
    st.dictionaries(st.text(letters, min_size=1), st.floats(0, allow_infinity=False), min_size=1),
    st.integers(1, 200),
    st.booleans(),
)
def test_no_line_is_wider_than_asked_and_larger_values_have_no_shorter_bars(values, width, ascii_only):
    lines = bar_chart(values, width, ascii_only=ascii_only).splitlines()
    assert len(lines) == len(values)
    assert all(len(line) <= width for line in lines)
    assert not ascii_only or all(line.isascii() for line in lines)
    bars = [sum(letter in "█▏▎▍▌▋▊▉" for letter in line) for line in lines]
    if not ascii_only:
        order = sorted(range(len(values)), key=lambda i: list(values.values())[i])
        assert all(bars[a] <= bars[b] for a, b in itertools.pairwise(order))
