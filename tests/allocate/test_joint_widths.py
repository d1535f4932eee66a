"""Widths of groups: the toy network of the specification, a general solver, brute force, and budgets that are never exceeded."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, nnls

from layerwise.allocate import Program, Shape, Side, Steps, fitted_widths, flow_densities, joint_widths, whole_widths
from layerwise.allocate.log_fit import nonnegative_least_squares
from layerwise.errors import BudgetError, ConfigError

FULL = {"A": 16, "B": 16, "C": 32, "D": 32}
LAYERS = (  # kernel, positions, inputs, outputs; numbers never change
    (9, 1024, 3, "A"), (9, 1024, "A", "B"), (9, 1024, "B", "A"), (9, 256, "A", "C"), (9, 256, "C", "D"), (1, 256, "A", "D"), (1, 1, "D", 10),  # noqa: E501
)  # fmt: skip
PARAMETERS, WORK = 19_696, 8_831_296


def side(one):
    return Side(one) if isinstance(one, int) else Side(0, ((one, 1),))


def toy(*budgets):
    shapes = [
        Shape(tuple(kernel * (positions if one == "work" else 1) for one in budgets), (side(a), side(b)))
        for kernel, positions, a, b in LAYERS
    ]
    return Program(shapes, list(FULL))


def vector(program, widths):
    return np.array([widths[name] for name in program.names], dtype=float)


def gain(program, widths):
    return program.flow(vector(program, widths)) - program.flow(vector(program, FULL))


ONE = dict.fromkeys(FULL, 1.0)
STEPS = {name: Steps(units, 1, units) for name, units in FULL.items()}


@pytest.mark.parametrize(
    ("budgets", "widths", "flow", "whole", "whole_flow"),
    [
        (("weights",), (16, 14.9028, 9.9352, 32), -2.48139, (16, 16, 9, 32), -2.53702),
        (("weights", "work"), (16, 7.4345, 14.9141, 32), -3.05979, (16, 7, 15, 32), None),
        (("work",), (16, 6.5136, 17.3696, 32), None, None, None),
    ],
)
def test_half_of_the_toy_network(budgets, widths, flow, whole, whole_flow):
    program = toy(*budgets)
    limits = [{"weights": PARAMETERS, "work": WORK}[one] / 2 for one in budgets]
    got = joint_widths(program, limits, ONE, FULL)
    assert got == pytest.approx(dict(zip(FULL, widths)), abs=5e-5)
    assert flow is None or gain(program, got) == pytest.approx(flow, abs=1e-5)
    rounded = whole_widths(program, limits, got, STEPS)
    assert all(program.spent(vector(program, rounded)) <= limits)
    assert whole is None or rounded == dict(zip(FULL, whole))
    assert whole_flow is None or gain(program, rounded) == pytest.approx(whole_flow, abs=1e-5)


@pytest.mark.parametrize("share", [0.6, 0.4, 0.3])
@pytest.mark.parametrize("budgets", [("weights",), ("work",), ("weights", "work")])
def test_whole_widths_of_the_toy_network_against_brute_force(share, budgets):
    program, total = toy(*budgets), {"weights": PARAMETERS, "work": WORK}
    limits = [share * total[one] for one in budgets]
    got = vector(program, whole_widths(program, limits, joint_widths(program, limits, ONE, FULL), STEPS))
    a, b, c, d = np.meshgrid(*(np.arange(1.0, units + 1) for units in FULL.values()), indexing="ij")
    size = {"A": a, "B": b, "C": c, "D": d}
    layers = [(k, n, size.get(one, one), size.get(two, two)) for k, n, one, two in LAYERS]
    fits = np.ones_like(a, dtype=bool)
    for one, limit in zip(budgets, limits):
        fits &= sum(k * (n if one == "work" else 1) * i * o for k, n, i, o in layers) <= limit
    best = np.where(fits, sum(np.log(i * o) for _, _, i, o in layers), -np.inf).max()
    assert best - 0.01 <= program.flow(got) <= best + 1e-9


def test_the_toy_networks_other_numbers():
    both, weights = toy("weights", "work"), toy("weights")
    half = joint_widths(weights, [PARAMETERS / 2], ONE, FULL)
    assert both.spent(vector(both, half))[1] / WORK == pytest.approx(0.687, abs=5e-4)
    _, slope, _ = weights.slopes(vector(weights, half))
    assert (slope[0] / weights.ends(vector(weights, half)))[1:3] == pytest.approx([2146.0, 2146.0], abs=0.05)
    cheap = joint_widths(toy("work"), [WORK / 2], ONE, FULL)
    assert weights.spent(vector(weights, cheap))[0] / PARAMETERS == pytest.approx(0.540, abs=5e-4)
    assert both.spent(vector(both, {"A": 16, "B": 7, "C": 15, "D": 32})).tolist() == [9760, 4_297_024]
    ratio = brentq(lambda r: weights.spent(r * vector(weights, FULL))[0] - PARAMETERS / 2, 0.1, 1)
    assert ratio == pytest.approx(0.70143, abs=5e-6)
    uniform = {name: ratio * one for name, one in FULL.items()}
    assert gain(weights, uniform) == pytest.approx(-4.25561, abs=1e-5)


def test_layers_by_themselves_cannot_be_realised_and_their_fit_is_below_the_joint_optimum():
    """Checks 3 and 4: what the layers ask for, and the projection of it."""
    program = toy("weights")
    sizes = {
        str(index): k * (3 if a == 3 else FULL[a]) * (10 if b == 10 else FULL[b])
        for index, (k, _, a, b) in enumerate(LAYERS)
    }
    densities = flow_densities([sizes], [PARAMETERS / 2])
    wanted = (1, 0.93142, 0.93142, 0.46571, 0.23286, 1, 1)
    assert list(densities.values()) == pytest.approx(wanted, abs=5e-6)
    assert sum(map(math.log, densities.values())) == pytest.approx(-2.36361, abs=1e-5)
    assert (densities["3"] * 32, densities["4"] * 32) == pytest.approx((14.90, 7.45), abs=5e-3)  # both are C
    got = fitted_widths(program, [*densities.values()], [PARAMETERS / 2], ONE, FULL, FULL)
    assert got == pytest.approx({"A": 16, "B": 14.832, "C": 11.241, "D": 27.725}, abs=5e-4)
    assert gain(program, got) == pytest.approx(-2.67416, abs=1e-5)
    assert program.spent(vector(program, got))[0] == pytest.approx(PARAMETERS / 2, rel=1e-9)


def test_without_caps_it_degenerates_and_with_them_nothing_changes():
    program = toy("weights", "work")
    free = joint_widths(program, [PARAMETERS, WORK], ONE, dict.fromkeys(FULL, 1e4))
    assert free == pytest.approx({"A": 55.4, "B": 3.8, "C": 5.3, "D": 104.0}, abs=0.05)
    assert joint_widths(program, [PARAMETERS, WORK], ONE, FULL) == FULL
    capped = joint_widths(program, [PARAMETERS, WORK], ONE, {name: 2.0 * one for name, one in FULL.items()})
    assert all(capped[name] <= 2 * one + 1e-9 for name, one in FULL.items())
    assert gain(program, capped) > 0


# -- any network


@st.composite
def programs(draw, sums=True):
    """Random layers over two to four groups: fixed ends, depthwise ones, sides that are sums."""
    count = draw(st.integers(2, 4))
    names = [f"g{index}" for index in range(count)]

    def one_side():
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2 if sums else 1, unique=True))
        return Side(draw(st.integers(0, 3)) if sums else 0, tuple((name, draw(st.integers(1, 3))) for name in chosen))

    shapes = [Shape(_costs(draw), (Side(3), Side(0, ((name, 1),)))) for name in names]  # every group costs something
    for _ in range(draw(st.integers(1, 4))):
        shapes.append(Shape(_costs(draw), tuple(one_side() for _ in range(draw(st.integers(1, 2))))))
    return Program(shapes, names)


def _costs(draw):
    return (float(draw(st.integers(1, 9))), float(draw(st.integers(1, 900))))


@given(programs(sums=False), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
@settings(max_examples=20, deadline=None)
def test_the_joint_optimum_against_a_general_solver(program, one, two):
    count = len(program.names)
    low, high = np.full(count, 1.0), np.full(count, 12.0)
    least, most = program.spent(low), program.spent(high)
    limits = least + np.array([one, two]) * (most - least)
    named = [dict(zip(program.names, bound.tolist())) for bound in (low, high)]
    got = vector(program, joint_widths(program, limits.tolist(), *named))
    assert (program.spent(got) <= limits * (1 + 1e-9)).all()
    assert (got >= low).all()
    assert (got <= high).all()
    found = minimize(
        lambda y: -program.flow(np.exp(y)),
        np.log(low) + 1e-3,
        jac=lambda y: -program.ends(np.exp(y)),
        bounds=[(0, math.log(12))] * count,
        constraints={
            "type": "ineq",
            "fun": lambda y: np.log(limits / program.spent(np.exp(y))),
            "jac": lambda y: -program.slopes(np.exp(y))[1] / program.spent(np.exp(y))[:, None],
        },
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    at = np.clip(np.exp(found.x), low, high)
    if (program.spent(at) <= limits * (1 + 1e-8)).all():
        assert program.flow(got) >= program.flow(at) - 1e-6


@given(programs(), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
@settings(max_examples=20, deadline=None)
def test_whole_widths_hold_the_budgets_and_no_step_or_swap_gains(program, one, two):
    count = len(program.names)
    least, most = program.spent(np.ones(count)), program.spent(np.full(count, 6.0))
    limits = least + np.array([one, two]) * (most - least)
    low, high = dict.fromkeys(program.names, 1.0), dict.fromkeys(program.names, 6.0)
    wanted = joint_widths(program, limits.tolist(), low, high)
    got = whole_widths(program, limits.tolist(), wanted, {name: Steps(6, 1, 6) for name in program.names})
    at = vector(program, got)
    assert (program.spent(at) <= limits * (1 + 1e-9)).all()
    for up, down in itertools.product(range(count), range(-1, count)):
        tried = at.copy()
        tried[up] += 1
        if down >= 0:
            tried[down] -= 1
        if up != down and tried.min() >= 1 and tried.max() <= 6 and (program.spent(tried) <= limits).all():
            assert program.flow(tried) <= program.flow(at) + 1e-9


@given(programs(), st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8), st.floats(0.2, 0.9))
@settings(max_examples=20, deadline=None)
def test_fitted_widths_just_hold_a_budget(program, densities, share):
    full = dict.fromkeys(program.names, 12.0)
    limits = program.spent(np.full(len(full), 12.0)) * share
    low = dict.fromkeys(full, 0.01)
    got = vector(program, fitted_widths(program, densities[: program.costs.shape[1]], limits.tolist(), low, full, full))
    used = program.spent(got) / limits
    assert used.max() == pytest.approx(1.0, abs=1e-8)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_nonnegative_least_squares_against_scipy(seed):
    draw = np.random.default_rng(seed)
    matrix = draw.integers(-2, 3, (draw.integers(2, 8), draw.integers(1, 6))).astype(float)
    target = draw.normal(size=len(matrix))
    got = nonnegative_least_squares(matrix, target)
    assert (got >= 0).all()
    assert np.linalg.norm(matrix @ got - target) == pytest.approx(nnls(matrix, target)[1], abs=1e-8)


def test_steps_are_multiples_and_the_full_width():
    assert Steps(20, 1, 20, 8).allowed == [8, 16, 20]
    assert Steps(20, 9, 40, 8).allowed == [16, 20, 24, 32, 40]
    assert Steps(5, 5, 5, 8).allowed == [5]


def test_a_floor_is_not_lost_to_rounding():
    program = toy("weights")
    wanted = {"A": 15.99999999, "B": 16.0, "C": 32.0, "D": 31.9999999}
    assert whole_widths(program, [PARAMETERS], wanted, STEPS) == FULL


def test_budgets_that_cannot_be_met_say_what_could():
    program = toy("weights")
    with pytest.raises(BudgetError, match=r"a budget of 10 cannot be met.* cost 74"):
        joint_widths(program, [10], ONE, FULL)
    with pytest.raises(BudgetError, match="cannot be met"):
        whole_widths(program, [1000], ONE, {name: Steps(u, 8, u, 8) for name, u in FULL.items()})
    with pytest.raises(ConfigError, match="0 < low <= high"):
        joint_widths(program, [1000], ONE, dict.fromkeys(FULL, 0.5))
    with pytest.raises(ConfigError, match="no group"):
        Program([Shape((1.0,), (Side(3), Side(4)))], [])
