"""Levels of bits handed out in a given order: Layer-Wise Quantization (Dumitru et al. 2024, arXiv:2406.17415), for any number of levels.

A name here is whatever shares one level: a layer, layers that an engine fuses, a block. What is tied is one name with the sum of its
costs, so that a tie is part of the decision and not repaired afterwards.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..errors import BudgetError, ConfigError, ScoreError
from ..plan_bits import allowed

Costs = Mapping[str, Mapping[int, int]]
"""Name -> level (nominal bits per weight) -> bits that the name takes there in all: whole, and more at a higher level."""


def levels_in_order(
    order: Sequence[str], costs: Costs, sizes: Mapping[str, int], bits: float, *, spread: float = 0.0
) -> dict[str, int]:
    """Name -> level, so that all together take at most `bits` per weight; in the order of `costs`.

    order: every name once, the one that should keep its bits first. sizes: weights of each name. All start at their highest level and
    go down in one fixed sequence of single steps, from the last of the order on, for as long as the budget asks: a smaller budget
    lowers the same names further, and with two levels the last of the order are low, the others high.
    spread: with more levels, how far the sequence runs ahead at the end of the order. 0: everything goes down one level before anything
    goes down two, so two neighbouring levels are used; 1: each name goes down to the lowest before the next begins, so the middle is
    empty.
    Raises BudgetError saying what is feasible, ConfigError for an order that is not one of these names.
    """
    if sorted(order) != sorted(costs):
        raise ConfigError(f"levels_in_order: the order names {len(order)} of {len(costs)} names, or others.")
    if not 0 <= spread <= 1:
        raise ConfigError(f"levels_in_order: spread={spread:g}: give 0 (neighbouring levels) to 1 (the extremes).")
    budget = check_levels(costs, sizes, bits)
    levels = {name: max(of) for name, of in costs.items()}
    total = sum(costs[name][level] for name, level in levels.items())
    for name, level in _steps(order, costs, spread):
        if total <= budget:
            break
        total -= costs[name][levels[name]] - costs[name][level]
        levels[name] = level
    return levels


def _steps(order: Sequence[str], costs: Costs, spread: float) -> list[tuple[str, int]]:
    """(name, level that it goes down to), the first step first."""
    all_levels = sorted({level for of in costs.values() for level in of}, reverse=True)
    lag = (1 - spread) * len(order)  # steps by which one level down comes before the next
    steps = [
        (place + all_levels.index(level) * lag, place, -level, name)
        for place, name in enumerate(reversed(order))
        for level in costs[name]
        if level != max(costs[name])
    ]
    return [(name, -level) for _, _, level, name in sorted(steps)]


def by_score(scores: Mapping[str, float]) -> list[str]:
    """The names, highest score first; of equal scores the earlier name. Raises ScoreError for one that is not finite."""
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ScoreError(f'the score of "{name}" is {score}. Scores must be finite to be ordered.')
    return sorted(scores, key=lambda name: -scores[name])


def check_levels(costs: Costs, sizes: Mapping[str, int], bits: float) -> int:
    """The bits that all may take together. Raises BudgetError, saying what is feasible, for an average that no levels give."""
    if sizes.keys() != costs.keys():
        odd = sorted(sizes.keys() ^ costs.keys())
        raise ConfigError(f'levels: costs and sizes name different groups, such as "{odd[0]}".')
    if not math.isfinite(bits):
        raise ConfigError(f"bits={bits}: give a finite number of bits per weight.")
    total = sum(sizes.values())
    least, most = (sum(pick(of.values()) for of in costs.values()) for pick in (min, max))
    budget = allowed(bits, total)
    if not least <= budget or (budget > most and bits * total > most * (1 + 1e-9)):
        levels = ", ".join(map(str, sorted({level for of in costs.values() for level in of})))
        raise BudgetError(
            f"bits={bits:g}: with levels {levels} the {len(costs)} groups take {_up(least, total):g} to {_down(most, total):g} bits"
            " per weight. Ask for an average in between, or give other levels."
        )
    return budget


def average(levels: Mapping[str, int], costs: Costs, sizes: Mapping[str, int]) -> float:
    """Bits per weight that these levels take together; 0.0 of no weights."""
    total = sum(sizes.values())
    return sum(costs[name][level] for name, level in levels.items()) / total if total else 0.0


def merged(costs: Costs, groups: Mapping[str, Iterable[str]]) -> dict[str, dict[int, int]]:
    """Group -> level -> what its members take there together; levels that all of them have. Raises ConfigError if there are none."""
    found = {}
    for group, members in groups.items():
        inside = [costs[name] for name in members]
        shared = sorted(set[int].intersection(*(set(of) for of in inside)))
        if not shared:
            raise ConfigError(f'levels: the members of "{group}" have no level in common.')
        found[group] = {level: sum(of[level] for of in inside) for level in shared}
    return found


def _up(bits: int, weights: int) -> float:
    return math.ceil(bits / weights * 10_000 - 1e-6) / 10_000 if weights else 0.0


def _down(bits: int, weights: int) -> float:
    return math.floor(bits / weights * 10_000 + 1e-6) / 10_000 if weights else 0.0
