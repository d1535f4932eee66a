"""What a search should expect of choices that it has not measured: a sum of one effect for each group's pair, fitted to the others."""

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from math import lcm

import numpy as np

from ..allocate import additive_front
from .kv_space import Pairs, Space

_RIDGE = 1e-6  # of the mean diagonal: effects that nothing tells apart share what is known of their sum


class Expected:
    """Losses of quantised layers nearly add up where they are small, so the best sum within a budget is worth a trial.

    Relative errors are fitted, so that small losses, near which the answer lies, count as much as large ones. A pair that a group has not
    been seen with is expected to cost nothing, so it is tried soon.
    """

    def __init__(self, space: Space, bits: Callable[[Pairs], float], cap: float) -> None:
        self.space = space
        lowest = [options[0] for options in space.options]
        base = _exact(bits(space.pairs(lowest)))
        costs = [
            [_exact(bits(space.pairs([*lowest[:group], pair, *lowest[group + 1 :]]))) - base for pair in options]
            for group, options in enumerate(space.options)
        ]
        whole = lcm(*(cost.denominator for some in costs for cost in some))
        self.costs = [[int(cost * whole) for cost in some] for some in costs]
        self.left = (_exact(cap) - base) * whole  # above the lowest choice
        self.starts = np.cumsum([0, *(len(options) for options in space.options)])

    def all_within(self, most: int) -> list[Pairs] | None:
        """Every choice within the cap, or None where there are more than `most`."""
        found: list[tuple[tuple[int, ...], int]] = [((), 0)]
        for costs in self.costs:
            found = [
                ((*places, place), before + cost)
                for places, before in found
                for place, cost in enumerate(costs)
                if before + cost <= self.left
            ]
            if len(found) > most:  # the cheapest option of each group that is left costs nothing more
                return None
        return [self.space.chosen(places) for places, _ in found]

    def best(self, known: Mapping[Pairs, float], besides: Collection[Pairs] = ()) -> Pairs | None:
        """The choice on the front of expected losses, neither known nor among `besides`, that is nearest to the cap; None: no such."""
        rows, losses = [], []
        for pairs, loss in known.items():
            places = self.space.places(pairs)
            if places is not None and loss > 0:
                rows.append([int(start) + place for start, place in zip(self.starts, places.values(), strict=False)])
                losses.append(loss)
        if not rows:
            return None
        design = np.zeros((len(rows), int(self.starts[-1])))
        for row, (columns, loss) in enumerate(zip(rows, losses, strict=True)):
            design[row, columns] = 1 / loss
        gram = design.T @ design
        gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram)
        effects = np.linalg.solve(gram, design.sum(0))
        parts = [
            {place: (float(cost), float(effects[int(start) + place])) for place, cost in enumerate(costs)}
            for start, costs in zip(self.starts, self.costs, strict=False)
        ]
        for one in reversed([some for some in additive_front(parts) if some.cost <= self.left]):
            if (pairs := self.space.chosen(one.choices)) not in known and pairs not in besides:
                return pairs
        return None


def _exact(bits: float) -> Fraction:
    """The fraction that a float stands for: sums of what is a little off would miss the cap."""
    return Fraction(bits).limit_denominator(10**6)
