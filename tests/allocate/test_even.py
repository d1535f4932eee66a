import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import uniform, uniform_plus
from layerwise.errors import BudgetError, ConfigError

# CIFAR ResNet-20 as its first convolution, its classifier, and all between
RESNET20 = {"conv": 432, "middle": 270_896 - 432 - 640, "fc": 640}


def test_uniform_is_the_same_for_all():
    assert uniform({"a": 3, "b": 7}, 0.6) == {"a": 0.6, "b": 0.6}
    with pytest.raises(ConfigError, match=r"sparsity=1\.2"):
        uniform({"a": 3}, 1.2)


def test_uniform_plus_worked_by_hand():
    got = uniform_plus(RESNET20, 0.9)
    assert {name: 1 - sparsity for name, sparsity in got.items()} == pytest.approx(
        {"conv": 1, "middle": 0.098322, "fc": 0.2}, abs=1e-6
    )
    got = uniform_plus(RESNET20, 0.7)
    assert {name: 1 - sparsity for name, sparsity in got.items()} == pytest.approx(
        {"conv": 1, "middle": 0.298882, "fc": 0.298882}, abs=1e-6
    )


def test_uniform_plus_says_what_is_feasible():
    with pytest.raises(
        BudgetError, match=r"65 % can go \(1 of 3 layers stay dense\), target 90 %. Lower the sparsity to 0.65"
    ):
        uniform_plus({"a": 25, "b": 25, "c": 50}, 0.9)
    with pytest.raises(BudgetError, match="1 of 1 layers stay dense"):
        uniform_plus({"a": 25}, 0.1)
    assert uniform_plus({"a": 25}, 0.0) == {"a": 0.0}


def test_uniform_plus_takes_names():
    got = uniform_plus({"a": 10, "b": 10, "c": 10}, 0.5, first="b", last="a", last_density=0.5)
    assert got == pytest.approx({"a": 0.5, "b": 0.0, "c": 1.0})
    with pytest.raises(ConfigError, match='"d" is none of the 3 layers'):
        uniform_plus({"a": 10, "b": 10, "c": 10}, 0.5, first="d")


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=3, max_size=10), st.floats(0, 1), st.floats(0, 1))
def test_uniform_plus_meets_the_budget(values, share, last_density):
    sizes = {f"l{index}": size for index, size in enumerate(values)}
    total = sum(values)
    feasible = (total - values[0] - last_density * values[-1]) / total
    sparsity = share * feasible
    got = uniform_plus(sizes, sparsity, last_density=last_density)
    assert math.fsum(got[name] * size for name, size in sizes.items()) == pytest.approx(
        sparsity * total, abs=1e-9 * total
    )
    assert got["l0"] == 0
    assert 1 - list(got.values())[-1] >= last_density - 1e-12
    assert all(0 <= value <= 1 for value in got.values())
