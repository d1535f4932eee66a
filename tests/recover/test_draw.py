"""Draws of blocks: worked inclusions, exact counts, and streams that neither the order of a dict nor another block can change."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ConfigError
from layerwise.recover.draw import check_draw, drawn, inclusion, normalised

# D of LLaMA-2-7B for M = 13, percent, as the official repository has it
LLAMA2_7B = [
    0.2678, 0.2953, 0.1274, 0.1145, 0.0988, 0.0884, 0.0878, 0.0838, 0.0801, 0.0722, 0.0707, 0.0696, 0.0630, 0.0591, 0.0552, 0.0537,
    0.0468, 0.0392, 0.0336, 0.0340, 0.0316, 0.0279, 0.0278, 0.0229, 0.0254, 0.0209, 0.0242, 0.0182, 0.0184, 0.0209, 0.0241, 0.0825,
]  # fmt: skip


def successive(probabilities, blocks):
    """The oracle: every order in which so many can be drawn, with its probability."""
    found = dict.fromkeys(probabilities, 0.0)
    for order in itertools.permutations(probabilities, blocks):
        chance, left = 1.0, 1.0
        for name in order:
            chance, left = chance * probabilities[name] / left, left - probabilities[name]
        for name in order:
            found[name] += chance
    return found


def test_inclusion_worked_by_hand():
    p = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert inclusion(p, 2) == pytest.approx({"a": 0.8393, "b": 0.6750, "c": 0.4857}, abs=5e-5)
    assert successive(p, 2) == pytest.approx(inclusion(p, 2), abs=1e-7)
    assert sum(inclusion(p, 2).values()) == pytest.approx(2)
    assert inclusion(p, 3) == dict.fromkeys(p, 1.0)
    assert inclusion(p, 2, "independent") == {"a": 1.0, "b": 0.6, "c": 0.4}


def test_inclusion_of_the_shipped_distribution():
    p = normalised({str(block): value for block, value in enumerate(LLAMA2_7B)})
    assert (p["0"], p["1"], p["31"], p["27"]) == pytest.approx((0.1225, 0.1351, 0.0377, 0.0083), abs=5e-5)
    found = inclusion(p, 5)
    assert [found[block] for block in ("0", "1", "27", "31")] == pytest.approx([0.519, 0.554, 0.046, 0.197], abs=2e-3)
    assert sum(found.values()) == pytest.approx(5, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=6), st.integers(1, 3))
def test_inclusion_equals_that_of_every_order(weights, blocks):
    p = normalised({str(index): weight for index, weight in enumerate(weights)})
    assert inclusion(p, blocks) == pytest.approx(successive(p, blocks), abs=1e-6)


@pytest.mark.parametrize("draw", ["exact", "independent"])
def test_draws_come_as_often_as_they_should(draw):
    p, periods = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}, 3000
    counts, sizes = dict.fromkeys(p, 0), set()
    for period in range(periods):
        blocks = drawn(p, 2, draw, 0, period)
        sizes.add(len(blocks))
        for name in blocks:
            counts[name] += 1
    assert sizes == ({2} if draw == "exact" else {1, 2, 3, 4})  # "a" is in every independent draw: 2 * 0.5
    for name, wanted in inclusion(p, 2, draw).items():
        assert counts[name] / periods == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / periods))


def test_draws_depend_on_seed_period_and_name_alone():
    p = normalised({name: weight for weight, name in enumerate("abcdef", start=1)})
    turned = dict(reversed(p.items()))
    draws = [drawn(p, 3, "exact", 1, period) for period in range(50)]
    assert draws == [drawn(turned, 3, "exact", 1, period) for period in range(50)]
    assert draws != [drawn(p, 3, "exact", 2, period) for period in range(50)]
    # a block that leaves changes no draw that it was not in: the clocks of the others are their own
    rest = normalised({name: value for name, value in p.items() if name != "a"})
    assert all("a" in draw or draw == drawn(rest, 3, "exact", 1, period) for period, draw in enumerate(draws))


def test_zero_is_never_drawn():
    p = normalised({"a": 0.0, "b": 1.0, "c": 3.0})
    for draw in ("exact", "independent"):
        assert all("a" not in drawn(p, 2, draw, 0, period) for period in range(100))
        assert inclusion(p, 2, draw)["a"] == 0


@pytest.mark.parametrize(
    ("weights", "word"),
    [({"a": 0.0, "b": 0.0}, "none can be drawn"), ({"a": -1.0}, '"a" is -1'), ({"a": math.nan}, "nan")],
)
def test_weights_that_are_none_are_refused(weights, word):
    with pytest.raises(ConfigError, match=word):
        normalised(weights)


@pytest.mark.parametrize(
    ("blocks", "draw", "word"),
    [
        (3, "exact", r"2 blocks can be drawn \(1 more have probability 0\)\. Give 1 to 2"),
        (0, "exact", "1 to 2"),
        (1, "coin", "independent"),
    ],
)
def test_draws_that_cannot_be_are_refused(blocks, draw, word):
    with pytest.raises(ConfigError, match=word):
        check_draw({"a": 0.5, "b": 0.5, "c": 0.0}, blocks, draw)
