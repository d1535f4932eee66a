"""Densities of largest expected flow under one or more budgets (SynExp of PreCropping, Cai et al. 2022, arXiv:2203.02549).

The flow that a network of random weights and independent masks is expected to carry is a constant times the product of its layers'
densities. The largest under sum(cost * density) <= budget gives every layer that is not full the same absolute cost: water-filling, and
with two budgets the same at prices for both.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from ..errors import BudgetError, ConfigError


def flow_densities(
    costs: Sequence[Mapping[str, float]], budgets: Sequence[float], *, cap: float | None = 1.0
) -> dict[str, float]:
    """Name -> density that maximises sum(log density) with sum(cost * density) <= budget for each of one or two budgets.

    costs: one mapping of the same names for each budget, numbers above 0 (weights, multiply-adds). cap: the largest density; None: none.
    One budget: exact, in rounds. Two: bisection for the price of the second inside which the first is bisected, to about 1e-12.
    """
    if len(costs) != len(budgets) or not 1 <= len(costs) <= 2 or not costs[0]:
        raise ConfigError("flow_densities: give one or two budgets, costs for each, and at least one layer.")
    names = list(costs[0])
    if any(one.keys() != costs[0].keys() for one in costs) or any(not one[n] > 0 for one in costs for n in names):
        raise ConfigError("flow_densities: every budget needs a cost above 0 for each of the same layers.")
    if min(budgets) <= 0:
        raise BudgetError(f"flow_densities: a budget of {min(budgets):g} leaves nothing. Give one above 0.")
    if len(costs) == 1:
        return _one(costs[0], budgets[0], math.inf if cap is None else cap)
    return _two(costs, budgets, math.inf if cap is None else cap)


def _one(cost: Mapping[str, float], budget: float, cap: float) -> dict[str, float]:
    full: set[str] = set()
    level = 0.0
    while len(full) < len(cost):
        level = (budget - cap * sum(cost[name] for name in full) if full else budget) / (len(cost) - len(full))
        new = {name for name, one in cost.items() if name not in full and one * cap <= level}
        if not new:
            break
        full |= new
    return {name: cap if name in full else level / one for name, one in cost.items()}


def _two(costs: Sequence[Mapping[str, float]], budgets: Sequence[float], cap: float) -> dict[str, float]:
    first, second = costs
    count = len(first)

    def at(a: float, b: float) -> dict[str, float]:
        prices = {name: a * one + b * second[name] for name, one in first.items()}
        return {name: min(cap, 1 / price) if price > 0 else cap for name, price in prices.items()}

    def spent(cost: Mapping[str, float], densities: Mapping[str, float]) -> float:
        return math.fsum(cost[name] * one for name, one in densities.items())

    def least(b: float) -> dict[str, float]:
        """With the lowest price a of the first budget that meets it."""
        return at(_lowest(lambda a: spent(first, at(a, b)) <= budgets[0], count / budgets[0]), b)

    return least(_lowest(lambda b: spent(second, least(b)) <= budgets[1], count / budgets[1]))


def _lowest(holds: Callable[[float], bool], enough: float) -> float:
    """The lowest price in [0, enough] at which it holds; it holds from there on."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, enough
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
