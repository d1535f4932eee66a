from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import average, by_score, levels_in_order, merged
from layerwise.errors import BudgetError, ConfigError, ScoreError


def alike(count, levels=(2, 4), overhead=0):
    """Names of one weight each: costs are bits. overhead: in 1/100 bits, the weights are 100 then."""
    weights = 100 if overhead else 1
    costs = {f"b{i}": {level: level * weights + overhead for level in levels} for i in range(count)}
    return costs, dict.fromkeys(costs, weights)


def lowered(costs, sizes, bits, low=2, **more):
    got = levels_in_order(list(costs), costs, sizes, bits, **more)
    assert list(got) == list(costs)
    return [name for name, level in got.items() if level == low], average(got, costs, sizes)


@pytest.mark.parametrize(
    ("count", "bits", "low", "reached"),
    [(40, 3.5, 10, 3.5), (32, 2.85, 19, 2.8125), (40, 4.0, 0, 4.0), (40, 2.0, 40, 2.0), (3, 10 / 3, 1, 10 / 3)],
)
def test_worked_by_hand(count, bits, low, reached):
    costs, sizes = alike(count)
    assert lowered(costs, sizes, bits) == ([f"b{i}" for i in range(count - low, count)], pytest.approx(reached))


def test_scales_and_zeros_count_where_they_are_in_the_costs():
    costs, sizes = alike(40, overhead=25)  # 16-bit scale and shift for 128 weights: 0.25
    assert lowered(costs, sizes, 3.75) == ([f"b{i}" for i in range(30, 40)], 3.75)
    assert len(lowered(costs, sizes, 3.5)[0]) == 15


def test_of_unequal_names_as_many_as_the_budget_asks():
    costs = {name: {2: 2 * size, 4: 4 * size} for name, size in {"a": 10, "b": 1, "c": 5}.items()}
    sizes = {"a": 10, "b": 1, "c": 5}
    assert lowered(costs, sizes, 4 - 10 / 16) == (["c"], 4 - 10 / 16)
    assert lowered(costs, sizes, 4 - 11 / 16) == (["b", "c"], 4 - 12 / 16)
    assert lowered(costs, sizes, 4 - 13 / 16) == (["a", "b", "c"], 2)


def test_several_levels_neighbours_first_or_all_the_way_down():
    costs, sizes = alike(4, (2, 3, 4, 8))
    order = list(costs)
    assert list(levels_in_order(order, costs, sizes, 4.0).values()) == [4, 4, 4, 4]
    assert list(levels_in_order(order, costs, sizes, 3.5).values()) == [4, 4, 3, 3]
    assert list(levels_in_order(order, costs, sizes, 5.0, spread=1).values()) == [8, 8, 2, 2]
    # in turn: b3 to 4, b2 to 4, b3 to 3, b1 to 4: 19 bits of 20
    assert list(levels_in_order(order, costs, sizes, 5.0, spread=0.5).values()) == [8, 4, 4, 3]


def test_a_name_with_one_level_keeps_it():
    costs, sizes = alike(4)
    costs["b3"] = {4: 4}
    assert lowered(costs, sizes, 3.0)[0] == ["b1", "b2"]


def test_what_cannot_be_met_says_what_can():
    costs, sizes = alike(30, overhead=25)
    for bits in (2.2, 4.3):
        with pytest.raises(
            BudgetError, match=rf"bits={bits}: .* 2, 4 the 30 groups take 2\.25 to 4\.25 bits"
        ) as caught:
            levels_in_order(list(costs), costs, sizes, bits)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="or others"):
        levels_in_order(["b0"], costs, sizes, 3)
    with pytest.raises(ConfigError, match="spread=2"):
        levels_in_order(list(costs), costs, sizes, 3, spread=2)
    with pytest.raises(ConfigError, match="finite"):
        levels_in_order(list(costs), costs, sizes, float("nan"))


def test_by_score_of_equals_the_first_keeps():
    assert by_score({"a": 1.0, "b": 2.0, "c": 1.0, "d": 2.0}) == ["b", "d", "a", "c"]
    with pytest.raises(ScoreError, match='"b" is nan'):
        by_score({"a": 1.0, "b": float("nan")})


def test_what_is_tied_has_one_cost():
    costs = {"q": {2: 2, 4: 4, 8: 8}, "k": {4: 40, 2: 20}}
    assert merged(costs, {"qk": ["q", "k"]}) == {"qk": {2: 22, 4: 44}}
    with pytest.raises(ConfigError, match='"x" have no level in common'):
        merged({"a": {2: 2}, "b": {4: 4}}, {"x": ["a", "b"]})


@st.composite
def problems(draw):
    count = draw(st.integers(1, 8))
    levels = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
    sizes = {f"n{i}": draw(st.integers(1, 50)) for i in range(count)}
    overheads = {name: draw(st.integers(0, 9)) for name in sizes}
    costs = {name: {level: level * size + overheads[name] for level in levels} for name, size in sizes.items()}
    return draw(st.permutations(list(sizes))), costs, sizes, draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))


@settings(deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_never_above_the_budget_and_nested(problem, one, other):
    order, costs, sizes, spread = problem
    total = sum(sizes.values())
    least, most = (sum(pick(of.values()) for of in costs.values()) / total for pick in (min, max))
    smaller, larger = sorted(
        min(max(least + (most - least) * share, least * (1 + 1e-12)), most) for share in (one, other)
    )
    low, high = (levels_in_order(order, costs, sizes, bits, spread=spread) for bits in (smaller, larger))
    for levels, bits in ((low, smaller), (high, larger)):
        spent = sum(costs[name][level] for name, level in levels.items())
        assert spent <= Fraction(bits) * total * (1 + Fraction(1, 10**14))
        # and as many bits as the sequence allows: two levels, the last that was lowered was needed
        if len({level for of in costs.values() for level in of}) == 2:
            down = [name for name in order if levels[name] == min(costs[name])]
            assert down == order[len(order) - len(down) :]
            if down:
                assert (
                    spent + costs[down[0]][max(costs[down[0]])] - costs[down[0]][levels[down[0]]]
                    > Fraction(bits) * total
                )
    assert all(low[name] <= high[name] for name in costs)
