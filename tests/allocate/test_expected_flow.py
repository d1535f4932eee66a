"""Densities of largest expected flow: the worked numbers, any two budgets against scipy, and what the flow of random masks really is."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from layerwise.allocate import Program, Shape, Side, flow_densities
from layerwise.errors import BudgetError, ConfigError


def resnet20():
    """Layer -> weights of CIFAR ResNet-20 with 1x1 projections."""
    sizes = {"stem": 432, "fc": 640}
    for stage, width in enumerate((16, 32, 64)):
        for number in range(6):
            inputs = width // 2 if stage and not number else width
            sizes[f"{stage}.{number}"] = 9 * inputs * width
        if stage:
            sizes[f"{stage}.projection"] = width * width // 2
    return sizes


def test_water_filling_worked_by_hand():
    got = flow_densities([{"a": 100, "b": 1000, "c": 4000}], [1500])
    assert got == pytest.approx({"a": 1, "b": 0.7, "c": 0.175}, abs=1e-12)
    assert sum(map(math.log, got.values())) == pytest.approx(-2.099644, abs=1e-6)
    sizes = np.array([100.0, 1000, 4000])
    found = minimize(
        lambda p: -np.log(p).sum(),
        np.full(3, 0.2),
        jac=lambda p: -1 / p,
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "ineq", "fun": lambda p: 1 - sizes @ p / 1500, "jac": lambda _: -sizes / 1500},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert found.x == pytest.approx([*got.values()], abs=1e-6)


def test_resnet20_worked_by_hand():
    sizes = resnet20()
    assert sum(sizes.values()) == 270_896
    half = flow_densities([sizes], [135_448])
    below = {name: one for name, one in half.items() if one < 1}
    assert {name: round(one, 5) for name, one in below.items()} == {"2.0": 0.60858} | {
        f"2.{number}": 0.30429 for number in range(1, 6)
    }
    assert sizes["2.1"] * half["2.1"] == pytest.approx(11_217.33, abs=0.01)
    tenth = flow_densities([sizes], [27_089.6])
    assert tenth["stem"] == tenth["fc"] == tenth["1.projection"] == 1
    assert [round(tenth[f"{stage}.1"], 5) for stage in range(3)] == [0.58264, 0.14566, 0.03641]
    assert sizes["2.1"] * tenth["2.1"] == pytest.approx(1342.4, abs=0.05)
    assert sum(map(math.log, tenth.values())) == pytest.approx(-33.71279, abs=1e-5)


costs = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=2, max_size=6)


@given(costs, st.floats(0.05, 1.2), st.floats(0.05, 1.2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_two_budgets_against_a_general_solver(pairs, one, two, capped):
    names = [str(index) for index in range(len(pairs))]
    tables = [dict(zip(names, column)) for column in zip(*pairs)]
    budgets = [share * sum(table.values()) for share, table in zip((one, two), tables)]
    got = flow_densities(tables, budgets, cap=1.0 if capped else None)
    spent = [sum(table[name] * got[name] for name in names) for table in tables]
    assert all(used <= budget * (1 + 1e-9) for used, budget in zip(spent, budgets))
    matrix = np.array(pairs, dtype=float).T / np.array(budgets)[:, None]
    start = np.full(len(names), 0.5 / len(names) / matrix.max())
    found = minimize(
        lambda p: -np.log(p).sum(),
        start,
        jac=lambda p: -1 / p,
        bounds=[(1e-9, 1.0 if capped else None)] * len(names),
        constraints={"type": "ineq", "fun": lambda p: 1 - matrix @ p, "jac": lambda p: -matrix},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    reached = np.log(found.x).sum() if (matrix @ found.x <= 1 + 1e-9).all() else -np.inf
    assert sum(map(math.log, got.values())) >= reached - 1e-6


def test_without_caps_small_layers_grow():
    """Check 5: the layers of the toy network with parameters and multiply-adds at 100 %."""
    weights = dict(zip("stem b1c1 b1c2 b2c1 b2c2 proj fc".split(), (432, 2304, 2304, 4608, 9216, 512, 320)))
    positions = dict(zip(weights, (1024, 1024, 1024, 256, 256, 256, 1)))
    work = {name: one * positions[name] for name, one in weights.items()}
    got = flow_densities([weights, work], [19_696, 8_831_296], cap=None)
    assert (got["stem"], got["fc"]) == pytest.approx((4.80, 12.16), abs=5e-3)
    assert got["b2c2"] == pytest.approx(0.3465, abs=5e-5)
    assert flow_densities([weights, work], [19_696, 8_831_296]) == dict.fromkeys(weights, 1.0)


def test_flow_of_random_masks():
    """Check 6: masks that layers draw for themselves lose flow as the product of densities says; channels shared by two lose it once."""
    widths, densities, draws = (8, 32, 32, 16), (0.5, 0.25, 0.5), 4000
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(draws, after, before, generator=generator).abs() / math.sqrt(before)
        for before, after in pairwise(widths)
    ]

    def flow(masks):
        signal = torch.ones(draws, widths[0], 1)
        for weight, mask in zip(weights, masks):
            signal = (weight * mask) @ signal
        return float(signal.sum((1, 2)).mean())

    filters = [
        (torch.rand(draws, one.shape[1], 1, generator=generator) < p).float() for one, p in zip(weights, densities)
    ]
    independent = [(torch.rand(one.shape, generator=generator) < p).float() for one, p in zip(weights, densities)]
    channels = [(torch.rand(draws, width, generator=generator) < 0.5).float() for width in widths[1:3]]
    shared = [channels[0][:, :, None], channels[1][:, :, None] * channels[0][:, None], channels[1][:, None]]
    dense = 8 * math.prod(after * math.sqrt(2 / math.pi / before) for before, after in pairwise(widths))
    program = Program(  # the same network at half its inner widths: its flow is the layers' densities
        [Shape((1.0,), (Side(8), Side(0, (("a", 1),)))), Shape((1.0,), (Side(0, (("a", 1),)), Side(0, (("b", 1),)))),
         Shape((1.0,), (Side(0, (("b", 1),)), Side(16)))],
        ["a", "b"],
    )  # fmt: skip
    lost = math.exp(program.flow(np.array([16.0, 16.0])) - program.flow(np.array([32.0, 32.0])))
    assert lost == pytest.approx(math.prod(densities))
    assert dense * lost == pytest.approx(45.97, abs=5e-3)
    # four standard errors of so many draws
    assert flow(independent) == pytest.approx(dense * lost, abs=4 * 0.10)
    assert flow(filters) == pytest.approx(dense * lost, abs=4 * 0.34)
    assert flow(shared) == pytest.approx(183.9, abs=4 * 0.79)


def test_what_cannot_be_solved():
    with pytest.raises(BudgetError, match="leaves nothing"):
        flow_densities([{"a": 1}], [0])
    with pytest.raises(ConfigError, match="above 0"):
        flow_densities([{"a": 0}], [1])
    with pytest.raises(ConfigError, match="one or two budgets"):
        flow_densities([{"a": 1}], [1, 2])
