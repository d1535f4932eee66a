"""Which level each name gets, when the error of every name at every level is known: the multiple-choice knapsack, exactly.

`hull_levels` is the rule that takes the largest fall of error per bit (the greedy of Dyer 1984 and Zemel 1984, which solves the
relaxation where a name may lie between two levels); `least_error_levels` starts from it and searches on with the relaxation as a bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ScoreError
from .levels import Costs, check_levels

Errors = Mapping[str, Mapping[int, float]]
"""Name -> level -> error there, at least 0, in any unit that can be summed over names."""
Indices = NDArray[np.int64]

MOST_STATES = 1 << 16  # partial choices that are held at once; more are cut, and the bound says what that may cost


@dataclass(frozen=True)
class Choice:
    """Levels by name, the sum of their errors, and a bound: no choice within the budget has a smaller sum than `bound`."""

    levels: dict[str, int]
    error: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether it is proven that nothing is better, up to the rounding of the sums."""
        return self.error - self.bound <= 1e-12 * abs(self.error)


def hull_levels(errors: Errors, costs: Costs, sizes: Mapping[str, int], bits: float) -> Choice:
    """The largest fall of error per bit first, on the lower convex hull of each name, as long as it fits `bits` per weight.

    What does not fit is passed over, and smaller steps of other names may follow. The sum is less than the fall of the first step that did
    not fit above the least possible. Raises BudgetError saying what is feasible, ConfigError, ScoreError.
    """
    budget = check_levels(costs, sizes, bits)
    _check(errors, costs)
    hulls = {name: _hull(errors[name], costs[name]) for name in costs}
    steps = sorted(
        (-_fall(errors[name], costs[name], before, after), place, index, name, after)
        for place, (name, hull) in enumerate(hulls.items())
        for index, (before, after) in enumerate(pairwise(hull))
    )
    levels = {name: hull[0] for name, hull in hulls.items()}
    reached = dict.fromkeys(costs, 0)
    left = budget - sum(costs[name][level] for name, level in levels.items())
    bound: float | None = None
    for slope, _, index, name, level in steps:
        if reached[name] != index:  # an earlier step of this name did not fit
            continue
        extra = costs[name][level] - costs[name][levels[name]]
        if extra <= left:
            levels[name], reached[name], left = level, index + 1, left - extra
        elif bound is None:
            bound = _sum(errors, levels) + slope * left
    error = _sum(errors, levels)
    return Choice(levels, error, error if bound is None else min(bound, error))


def least_error_levels(errors: Errors, costs: Costs, sizes: Mapping[str, int], bits: float) -> Choice:
    """The levels of least summed error that take at most `bits` per weight.

    Name by name, every partial choice is kept that no other one beats in both bits and error, and that could still beat the best known
    by the relaxation of the names to come. More than MOST_STATES are cut to the most promising, and `bound` says what that may have
    missed. Never worse than `hull_levels`, whose choice stands where nothing is better. Raises as that.
    """
    best = hull_levels(errors, costs, sizes, bits)
    if best.exact:
        return best
    budget, bound = check_levels(costs, sizes, bits), best.error
    # names with the widest choice first: what is left then is fine-grained, and its relaxation close
    names = sorted(costs, key=lambda name: min(costs[name].values()) - max(costs[name].values()))
    spent, error = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[list[int], Indices]] = []
    for name, rest in zip(names, _relaxations(names, errors, costs)[1:], strict=True):
        options = sorted(costs[name])
        grown = np.concatenate([spent + costs[name][level] for level in options])
        summed = np.concatenate([error + errors[name][level] for level in options])
        kept = _unbeaten(grown, summed)
        least = summed[kept] + rest.at(budget - grown[kept])
        kept, least = kept[least < best.error], least[least < best.error]
        if len(kept) > MOST_STATES:
            ranked = np.argsort(least, kind="stable")
            bound = min(bound, float(least[ranked[MOST_STATES]]))
            kept = kept[np.sort(ranked[:MOST_STATES])]
        if not len(kept):
            break
        trail.append((options, kept))
        spent, error = grown[kept], summed[kept]
    else:
        found = _walked(int(np.argmin(error)), names, trail)
        levels = {name: found[name] for name in costs}
        total = _sum(errors, levels)
        if total < best.error:
            return Choice(levels, total, max(best.bound, min(bound, total)))
    return Choice(best.levels, best.error, max(best.bound, bound))


@dataclass(frozen=True)
class _Relaxation:
    """The least summed error of some names that may lie between two levels, as a function of the bits they may take: convex, in pieces."""

    bits: NDArray[np.float64]  # where a piece begins, rising
    errors: NDArray[np.float64]

    def at(self, bits: Indices) -> NDArray[np.float64]:
        """inf where so few bits do not suffice."""
        inside = np.interp(bits.astype(np.float64), self.bits, self.errors)
        return np.where(bits < self.bits[0], np.inf, inside)


def _relaxations(names: Sequence[str], errors: Errors, costs: Costs) -> list[_Relaxation]:
    """That of names[i:] for every i, the last of no names."""
    found = [_Relaxation(np.zeros(1), np.zeros(1))]
    base, start = 0, 0.0
    bits, falls = np.zeros(0), np.zeros(0)
    for name in reversed(names):
        hull = _hull(errors[name], costs[name])
        base, start = base + costs[name][hull[0]], start + errors[name][hull[0]]
        pairs = list(pairwise(hull))
        bits = np.concatenate([bits, [costs[name][b] - costs[name][a] for a, b in pairs]])
        falls = np.concatenate([falls, [errors[name][b] - errors[name][a] for a, b in pairs]])
        order = np.argsort(falls / bits, kind="stable")
        bits, falls = bits[order], falls[order]
        ends = np.concatenate([[0.0], np.cumsum(bits)]), np.concatenate([[0.0], np.cumsum(falls)])
        found.append(_Relaxation(base + ends[0], start + ends[1]))
    return found[::-1]


def _unbeaten(spent: Indices, error: NDArray[np.float64]) -> Indices:
    """Indices of those that no other one beats or equals in both, by rising bits."""
    order = np.lexsort((error, spent))
    lowest = np.minimum.accumulate(error[order])
    unbeaten: Indices = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
    return unbeaten


def _walked(last: int, names: Sequence[str], trail: Sequence[tuple[list[int], Indices]]) -> dict[str, int]:
    """Name -> level along the way that led to the partial choice `last`. Each stage wrote its options one after the other."""
    found, state = {}, last
    for index in reversed(range(len(names))):
        options, kept = trail[index]
        before = len(trail[index - 1][1]) if index else 1
        option, state = divmod(int(kept[state]), before)
        found[names[index]] = options[option]
    return found


def _hull(errors: Mapping[int, float], costs: Mapping[int, int]) -> list[int]:
    """The levels on the lower convex hull of (bits, error), from the cheapest to that of least error."""
    hull: list[int] = []
    for level in sorted(costs, key=lambda one: (costs[one], errors[one])):
        if hull and (errors[level] >= errors[hull[-1]] or costs[level] == costs[hull[-1]]):
            continue
        while len(hull) > 1 and _fall(errors, costs, hull[-2], hull[-1]) <= _fall(errors, costs, hull[-1], level):
            hull.pop()
        hull.append(level)
    return hull


def _fall(errors: Mapping[int, float], costs: Mapping[int, int], before: int, after: int) -> float:
    """By how much the error falls per bit."""
    return (errors[before] - errors[after]) / (costs[after] - costs[before])


def _sum(errors: Errors, levels: Mapping[str, int]) -> float:
    return math.fsum(errors[name][level] for name, level in levels.items())


def _check(errors: Errors, costs: Costs) -> None:
    for name, of in costs.items():
        if name not in errors or not of.keys() <= errors[name].keys():
            raise ConfigError(f'levels: "{name}" has no error for one of its levels {", ".join(map(str, of))}.')
        for level in of:
            if not (math.isfinite(errors[name][level]) and errors[name][level] >= 0):
                raise ScoreError(
                    f'the error of "{name}" at {level} bits is {errors[name][level]}: give finite ones >= 0.'
                )
