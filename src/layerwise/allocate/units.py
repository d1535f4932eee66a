"""How many units each group keeps, so that a model has so many parameters: exact integers, floors, multiples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BudgetError


@dataclass(frozen=True)
class Sized:
    """A group as allocation sees it. cost: parameters that one unit takes along. least: units that must stay. multiple: what the number
    that stays divides by."""

    units: int
    cost: int
    least: int = 1
    multiple: int = 1

    def allowed(self, kept: int) -> int:
        """The next number not below that may stay."""
        least = -(-self.least // self.multiple) * self.multiple
        return min(self.units, max(least, -(-kept // self.multiple) * self.multiple))


def parameters_of(total: int, groups: Mapping[str, Sized], kept: Mapping[str, int]) -> int:
    """Of a model of `total` parameters whose groups keep so many units."""
    return total - sum(group.cost * (group.units - kept[name]) for name, group in groups.items())


def check_target(
    target: int,
    total: int,
    groups: Mapping[str, Sized],
    who: str,
    unit: str = "parameters",
    words: Callable[[int], str] = "{:,}".format,
) -> None:
    """Raise BudgetError where so few parameters (or whatever a cost is in) cannot be reached, with what can, or so many are not there."""
    least = parameters_of(total, groups, {name: group.allowed(0) for name, group in groups.items()})
    if target < least:
        raise BudgetError(
            f"{who}: {words(target)} of {words(total)} {unit} cannot be kept by cutting heads and channels alone; {words(least)}"
            f" ({least / total:.1%}) is the least, with one unit (or the floor asked for) left in every group. Ask for more, or drop"
            " blocks."
        )
    if target > total:
        raise BudgetError(
            f"{who}: the model has {words(total)} {unit}, {words(target)} cannot be kept. Give a share below 1."
        )


def meet(
    total: int, groups: Mapping[str, Sized], target: int, wanted: Callable[[float], Mapping[str, float]]
) -> dict[str, int]:
    """Group -> units kept, as many parameters as fit into `target`.

    wanted: t in [0, 1] -> units to keep of each group, a share of a unit allowed, all falling with t, everything at 0 and as little as it
    goes at 1. The smallest t that fits is bisected; what room is left then goes to single units, of those that are furthest below what
    was wanted first.
    """

    def counts(t: float) -> dict[str, int]:
        return {name: groups[name].allowed(int(kept + 1e-9)) for name, kept in wanted(t).items()}

    low, high = 0.0, 1.0
    if parameters_of(total, groups, counts(0.0)) <= target:
        return counts(0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters_of(total, groups, counts(middle)) <= target else (middle, high)
    found, ideal = counts(high), wanted(low)
    return fill(total, groups, target, found, ideal)


def fill(
    total: int, groups: Mapping[str, Sized], target: int, kept: Mapping[str, int], ideal: Mapping[str, float]
) -> dict[str, int]:
    """Single units more where they fit, those furthest below `ideal` (in shares of their group) first, ties in order."""
    found, room = dict(kept), target - parameters_of(total, groups, kept)
    while True:
        fits = [
            name
            for name, group in groups.items()
            if found[name] + group.multiple <= group.units and group.cost * group.multiple <= room
        ]
        if not fits:
            return found
        best = max(fits, key=lambda name: (ideal[name] - found[name]) / groups[name].units)
        found[best] += groups[best].multiple
        room -= groups[best].cost * groups[best].multiple


def lowest_first(scores: Sequence[float], kept: int) -> list[int]:
    """The units that stay when the lowest go first, in order; of equal scores the lower index goes, as in a stable argsort."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return sorted(order[len(scores) - kept :])
