"""Which choices are worth having: none is both cheaper and better. Fronts of one layer, and of sums over all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C")


def pareto_front(points: Mapping[C, tuple[float, float]]) -> list[C]:
    """The choices that no other beats: (cost, error) both as low or lower, one of them lower. Cheapest first.

    Of choices equal in both, the first of `points` stays, the others go: the answer does not depend on anything else.
    """
    front, best = list[C](), float("inf")
    for choice in sorted(points, key=lambda one: points[one]):  # stable: equals stay in the order given
        if points[choice][1] < best:
            best = points[choice][1]
            front.append(choice)
    return front


@dataclass(frozen=True)
class Sum(Generic[C]):
    """One choice for every part, with what they cost and err together."""

    cost: float
    error: float
    choices: tuple[C, ...]


def additive_front(parts: Sequence[Mapping[C, tuple[float, float]]]) -> list[Sum[C]]:
    """The exact front of sums: one choice for each part, costs and errors added up, cheapest first.

    A part of an undominated sum is undominated itself, so the sums of the first parts are cut to their front before the next joins. With
    whole costs there are never more points than different total costs: the table of a knapsack, for all budgets at once.
    """
    front = [Sum[C](0, 0.0, ())]
    for part in parts:
        kept = {choice: part[choice] for choice in pareto_front(part)}
        sums = [
            Sum(before.cost + cost, before.error + error, (*before.choices, choice))
            for before in front
            for choice, (cost, error) in kept.items()
        ]
        places = pareto_front({index: (one.cost, one.error) for index, one in enumerate(sums)})
        front = [sums[place] for place in places]
    return front
