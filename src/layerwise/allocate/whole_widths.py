"""From widths to whole units: floors, single steps up, swaps. The budget is never exceeded; rounding to the nearest would."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .joint_widths import Program, Vector, check_least


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
    group down by up to three steps and others up while that gains. Raises BudgetError where even the least widths are over a budget.
    """
    search = _Search(program, np.array(budgets, dtype=np.float64), [steps[name].allowed for name in program.names])
    check_least(program, search.limits, search.widths([0] * len(search.allowed)))
    at = [
        max(0, sum(one <= wanted[name] + 1e-6 for one in allowed) - 1)
        for name, allowed in zip(program.names, search.allowed, strict=True)
    ]
    while search.over(at):  # steps may not reach down to what was wanted
        at = search.lowered(at)
    at = search.raised(at)
    while (better := search.exchanged(at)) is not None:
        at = better
    return {name: one[place] for name, one, place in zip(program.names, search.allowed, at, strict=True)}


class _Search:
    """Places in the lists of allowed widths, one for each group."""

    def __init__(self, program: Program, limits: Vector, allowed: Sequence[Sequence[int]]) -> None:
        self.program, self.limits, self.allowed = program, limits * (1 + 1e-12), allowed

    def widths(self, at: Sequence[int]) -> Vector:
        return np.array([one[place] for one, place in zip(self.allowed, at, strict=True)], dtype=np.float64)

    def over(self, at: Sequence[int]) -> bool:
        return bool((self.program.spent(self.widths(at)) > self.limits).any())

    def raised(self, at: Sequence[int], barred: int = -1) -> list[int]:
        """Single steps up while one fits, the most flow for its cost first."""
        at = [*at]
        while True:
            room, steps = self._steps(at, +1)
            if barred >= 0:
                room[barred] = False
            spent, flow, here, now = self._tried(at, steps)
            room &= (spent <= self.limits[:, None]).all(0)
            if not room.any():
                return at
            price = ((spent - here[:, None]) / self.limits[:, None]).sum(0)
            worth = np.where(room, (flow - now) / np.where(room, price, 1.0), -np.inf)
            at[int(worth.argmax())] += 1

    def exchanged(self, at: Sequence[int]) -> list[int] | None:
        """The best that one group's way down, by up to three steps, makes room for; None where nothing gains."""
        best, most = None, self.program.flow(self.widths(at)) + 1e-11
        for down, by in itertools.product(range(len(at)), (1, 2, 3)):
            if at[down] < by:
                continue
            lower = [*at]
            lower[down] -= by
            room, steps = self._steps(lower, +1)
            spent, flow, _, _ = self._tried(lower, steps)
            room[down] = False
            room &= (spent <= self.limits[:, None]).all(0)
            starts = [lower]
            if room.any():
                starts.append([*lower])
                starts[1][int(np.where(room, flow, -np.inf).argmax())] += 1
            for start in starts:
                found = self.raised(start, barred=down)
                if (gained := self.program.flow(self.widths(found))) > most:
                    best, most = found, gained
        return best

    def lowered(self, at: Sequence[int]) -> list[int]:
        """The step down that loses least flow for what it saves of the budgets that are exceeded."""
        at = [*at]
        room, steps = self._steps(at, -1)
        spent, flow, here, now = self._tried(at, steps)
        over = here > self.limits
        saved = ((here[:, None] - spent) / self.limits[:, None])[over].sum(0)
        loss = np.where(room & (saved > 0), (now - flow) / np.where(saved > 0, saved, 1.0), np.inf)
        at[int(loss.argmin())] -= 1
        return at

    def _steps(self, at: Sequence[int], by: int) -> tuple[NDArray[np.bool_], Vector]:
        room = np.array([0 <= place + by < len(one) for place, one in zip(at, self.allowed, strict=True)])
        sizes = [
            one[place + by] - one[place] if there else 0
            for place, one, there in zip(at, self.allowed, room, strict=True)
        ]
        return room, np.array(sizes, dtype=np.float64)

    def _tried(self, at: Sequence[int], steps: Vector) -> tuple[Vector, Vector, Vector, float]:
        widths = self.widths(at)
        return (*self.program.stepped(widths, steps), self.program.spent(widths), self.program.flow(widths))
