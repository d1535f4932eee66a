"""From widths to whole units: floors, single steps up, swaps. The budget is never exceeded; rounding to the nearest would."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .joint_widths import Program, Vector, check_least

Widths = Callable[[Sequence[int]], Vector]


@dataclass(frozen=True)
class Steps:
    """Widths that a group may have: multiples of `multiple` from `least` to `most`, and `units`, its full width, where it lies between."""

    units: int
    least: int
    most: int
    multiple: int = 1

    @property
    def allowed(self) -> list[int]:
        """In order; never empty."""
        start = -(-self.least // self.multiple) * self.multiple
        found = {*range(start, self.most + 1, self.multiple)}
        if self.least <= self.units <= self.most or not found:
            found.add(min(self.units, self.most))
        return sorted(found)


def whole_widths(
    program: Program, budgets: Sequence[float], wanted: Mapping[str, float], steps: Mapping[str, Steps]
) -> dict[str, int]:
    """Group -> whole width of as much flow as these steps find from `wanted`, every cost within its budget.

    Floors first (what a solver calls 15.9999999 is 16); then the step up that gains most flow for its cost, as long as one fits; then one
    group up and another down while that gains. Raises BudgetError where even the least widths are over a budget.
    """
    limits = np.array(budgets, dtype=np.float64) * (1 + 1e-12)
    allowed = [steps[name].allowed for name in program.names]
    check_least(program, limits, np.array([one[0] for one in allowed], dtype=np.float64))
    at = [_floor(one, wanted[name]) for name, one in zip(program.names, allowed, strict=True)]

    def widths(places: Sequence[int]) -> Vector:
        return np.array([one[place] for one, place in zip(allowed, places, strict=True)], dtype=np.float64)

    while (program.spent(widths(at)) > limits).any():  # steps may not reach down to what was wanted
        at = _lowered(program, limits, at, widths)
    while True:
        at = _raised(program, limits, at, allowed, widths)
        swapped = _swapped(program, limits, at, allowed, widths)
        if swapped is None:
            return {name: one[place] for name, one, place in zip(program.names, allowed, at, strict=True)}
        at = swapped


def _floor(allowed: list[int], wanted: float) -> int:
    return max(0, sum(one <= wanted + 1e-6 for one in allowed) - 1)


def _raised(
    program: Program, limits: Vector, at: list[int], allowed: Sequence[Sequence[int]], widths: Widths
) -> list[int]:
    while True:
        here, flow = program.spent(widths(at)), program.flow(widths(at))
        best, most = None, 0.0
        for place in range(len(at)):
            if at[place] + 1 == len(allowed[place]):
                continue
            tried = [*at]
            tried[place] += 1
            spent = program.spent(widths(tried))
            if (spent <= limits).all():
                worth = (program.flow(widths(tried)) - flow) / float(((spent - here) / limits).sum())
                if worth > most * (1 + 1e-12):
                    best, most = tried, worth
        if best is None:
            return at
        at = best


def _swapped(
    program: Program, limits: Vector, at: list[int], allowed: Sequence[Sequence[int]], widths: Widths
) -> list[int] | None:
    """The best of all pairs of one up and one down; None where none gains."""
    best, most = None, program.flow(widths(at)) + 1e-12
    for up in range(len(at)):
        if at[up] + 1 == len(allowed[up]):
            continue
        for down in range(len(at)):
            if down == up or at[down] == 0:
                continue
            tried = [*at]
            tried[up], tried[down] = tried[up] + 1, tried[down] - 1
            found = widths(tried)
            if (flow := program.flow(found)) > most and (program.spent(found) <= limits).all():
                best, most = tried, flow
    return best


def _lowered(program: Program, limits: Vector, at: list[int], widths: Widths) -> list[int]:
    """The step down that loses least flow for what it saves of the budgets that are exceeded."""
    here, flow = program.spent(widths(at)), program.flow(widths(at))
    over = here > limits
    best, least = at, np.inf
    for place in range(len(at)):
        if at[place] == 0:
            continue
        tried = [*at]
        tried[place] -= 1
        saved = float(((here - program.spent(widths(tried))) / limits)[over].sum())
        loss = (flow - program.flow(widths(tried))) / saved if saved > 0 else np.inf
        if best is at or loss < least:
            best, least = tried, loss
    return best
