"""Widths of groups of channels that give the largest expected flow: a geometric program, solved exactly.

The objective is that of `expected_flow.py`, the product of the densities of all layers, over what can really be chosen: the widths of
groups, each of which several layers read or write. In logarithms of widths the costs are sums of exponentials, so that "log cost <= log
budget" is convex, and the objective is linear: one optimum, found by an interior-point method. Where a layer reads several groups side
by side, the logarithm of their sum is replaced by its tangent and the program solved again, which never loses flow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError, ConfigError

Vector = NDArray[np.float64]
_GAP = 1e-11  # of the logarithm of the flow, at the end


@dataclass(frozen=True)
class Side:
    """A size: so many channels that never change, and so many for each unit of some groups."""

    fixed: int = 0
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Shape:
    """A layer as allocation sees it. costs: one for each budget, of a layer of size 1; they multiply with all sides. A layer whose
    inputs are its outputs (depthwise) has one side."""

    costs: tuple[float, ...]
    sides: tuple[Side, ...]


class Program:
    """Layers and groups as matrices: costs and flow of any widths (in units, not necessarily whole), in the order of `names`."""

    def __init__(self, shapes: Sequence[Shape], names: Sequence[str]) -> None:
        if not shapes or not names:
            raise ConfigError("widths: there are no layers, or no group whose width could change.")
        self.names = list(names)
        place = {name: index for index, name in enumerate(names)}
        self.costs: Vector = np.array([one.costs for one in shapes], dtype=np.float64).T.reshape(-1, len(shapes))
        self.fixed: Vector = np.ones((2, len(shapes)))
        self.parts: Vector = np.zeros((2, len(shapes), len(names)))
        for row, shape in enumerate(shapes):
            if not 1 <= len(shape.sides) <= 2:
                raise ConfigError("widths: a layer has one side or two.")
            for number, side in enumerate(shape.sides):
                self.fixed[number, row] = side.fixed
                for name, count in side.parts:
                    self.parts[number, row, place[name]] += count

    def spent(self, widths: Vector) -> Vector:
        """One number for each budget."""
        one, two = self._sizes(widths)
        return np.asarray(self.costs @ (one * two))

    def flow(self, widths: Vector) -> float:
        """Sum of the logarithms of all sizes: that of the expected flow up to a constant."""
        one, two = self._sizes(widths)
        return float(np.log(one).sum() + np.log(two).sum())

    def ends(self, widths: Vector) -> Vector:
        """Of each group, how many sides it is, those shared with others by its share: the slope of `flow` in log width."""
        one, two = self._sizes(widths)
        return np.asarray(widths * ((self.parts[0] / one[:, None]).sum(0) + (self.parts[1] / two[:, None]).sum(0)))

    def slopes(self, widths: Vector) -> tuple[Vector, Vector, list[Vector]]:
        """Costs, and their first and second derivatives in log width: (b,), (b, g), b times (g, g)."""
        one, two = self._sizes(widths)
        spent, first, second = [], [], []
        for cost in self.costs:
            slope = widths * ((cost * two) @ self.parts[0] + (cost * one) @ self.parts[1])
            cross = (self.parts[0] * cost[:, None]).T @ self.parts[1]
            spent.append(cost @ (one * two))
            first.append(slope)
            second.append(np.diag(slope) + np.outer(widths, widths) * (cross + cross.T))
        return np.array(spent), np.array(first), second

    def stepped(self, widths: Vector, steps: Vector) -> tuple[Vector, Vector]:
        """(costs (b, g), flow (g)) when one group alone, each in turn, changes by its step."""
        one, two = self._sizes(widths)
        first, second = self.parts
        crossed = self.costs @ (first * second)
        alone = (self.costs * two) @ first + (self.costs * one) @ second
        spent = (self.costs @ (one * two))[:, None] + alone * steps + crossed * steps**2
        flow = np.log(one[:, None] + first * steps).sum(0) + np.log(two[:, None] + second * steps).sum(0)
        return spent, flow

    def _sizes(self, widths: Vector) -> Vector:
        return np.asarray(self.fixed + self.parts @ widths)


def joint_widths(
    program: Program, budgets: Sequence[float], low: Mapping[str, float], high: Mapping[str, float]
) -> dict[str, float]:
    """Group -> width, a share of a unit allowed, of largest flow with every cost within its budget and low <= width <= high.

    Exact to about 1e-9 of a width where every layer's sides are of one group each; with sums of groups a point that no small change
    improves. Raises BudgetError, with the least that is feasible, where `low` alone is over a budget.
    """
    limits = np.array(budgets, dtype=np.float64)
    lows, highs = (np.array([bound[name] for name in program.names], dtype=np.float64) for bound in (low, high))
    if len(limits) != len(program.costs) or (lows <= 0).any() or (lows > highs).any():
        raise ConfigError("joint_widths: give a budget for each cost, and 0 < low <= high for each group.")
    check_least(program, limits, lows)
    if (program.spent(highs) <= limits * (1 + 1e-12)).all():
        return dict(zip(program.names, highs.tolist(), strict=True))
    free = highs > lows * (1 + 1e-12)
    if not free.any() or (program.spent(lows) >= limits * (1 - 1e-9)).any():
        return dict(zip(program.names, lows.tolist(), strict=True))
    y = inside = _inside(program, limits, np.log(lows), np.log(highs), free)
    ends, flow = program.ends(np.exp(y)), -np.inf
    for gap in (1e-6, _GAP):
        for _ in range(100):  # one turn, unless sides are sums of groups
            start = y + 0.05 * (inside - y)  # away from the bounds that the last turn ended at
            y = _interior(program, limits, np.log(lows), np.log(highs), free, ends, start, gap)
            ends, last = program.ends(np.exp(y)), ends
            flow, reached = program.flow(np.exp(y)), flow
            if np.allclose(ends, last, rtol=0, atol=max(gap, 1e-9)) or flow - reached < max(gap, 1e-9):
                break
    return dict(zip(program.names, np.clip(np.exp(y), lows, highs).tolist(), strict=True))


def check_least(program: Program, budgets: Vector, least: Vector) -> None:
    """Raise BudgetError where these widths cost more than a budget."""
    for spent, budget in zip(program.spent(least), budgets, strict=True):
        if spent > budget * (1 + 1e-12):
            raise BudgetError(
                f"a budget of {budget:,.0f} cannot be met: with every group at its least width (min_channels, multiple_of) the layers"
                f" cost {spent:,.0f}. Raise the budget, or lower them."
            )


def _inside(program: Program, limits: Vector, floor: Vector, roof: Vector, free: NDArray[np.bool_]) -> Vector:
    """Logarithms of widths strictly inside all bounds and budgets: a little above the least."""
    step = 0.5
    y: Vector = floor.copy()
    while True:
        y[free] = floor[free] + step * (roof[free] - floor[free])
        if (program.spent(np.exp(y)) < limits * (1 - 1e-12)).all():
            return y
        step /= 2


def _interior(
    program: Program,
    limits: Vector,
    floor: Vector,
    roof: Vector,
    free: NDArray[np.bool_],
    ends: Vector,
    y: Vector,
    gap: float,
) -> Vector:
    """Newton's method on t * ends * y with logarithmic barriers at budgets and bounds, from y, t growing until the gap is that."""
    barriers = len(limits) + 2 * int(free.sum())
    t = 10.0
    while True:
        y = _centred(program, limits, floor, roof, free, ends * t, y)
        if barriers / t < gap:
            return y
        t *= 30


def _centred(
    program: Program,
    limits: Vector,
    floor: Vector,
    roof: Vector,
    free: NDArray[np.bool_],
    pull: Vector,
    y: Vector,
) -> Vector:
    def value(at: Vector) -> float:
        left = np.log(limits) - np.log(program.spent(np.exp(at)))
        above, below = (at - floor)[free], (roof - at)[free]
        if min(left.min(), above.min(), below.min()) <= 0:
            return np.inf
        return float(-pull @ (at - y) - np.log(left).sum() - np.log(above).sum() - np.log(below).sum())

    for _ in range(60):
        spent, first, second = program.slopes(np.exp(y))
        gradient, hessian = -pull.copy(), np.zeros((len(y), len(y)))
        room = np.log(limits) - np.log(spent)
        if room.min() <= 0:  # as near as the numbers allow
            break
        for left, cost, slope, curve in zip(room, spent, first, second, strict=True):
            relative = slope / cost
            gradient += relative / left
            hessian += (curve / cost - np.outer(relative, relative)) / left + np.outer(relative, relative) / left**2
        above, below = np.where(free, y - floor, 1.0), np.where(free, roof - y, 1.0)
        gradient += 1 / below - 1 / above
        hessian += np.diag(1 / below**2 + 1 / above**2)
        move, scale = np.zeros(len(y)), 1 / np.sqrt(np.diag(hessian))[free]  # barriers span many powers of ten
        system = hessian[np.ix_(free, free)] * np.outer(scale, scale)
        move[free] = -scale * np.linalg.solve(system, scale * gradient[free])
        decrease = -float(gradient @ move)
        if decrease < 1e-8:
            break
        size, here = 1.0, value(y)
        while value(y + size * move) > here - 0.1 * size * decrease and size > 1e-12:
            size /= 2
        if size <= 1e-12:  # as near as the numbers allow
            break
        y = y + size * move
    return y
