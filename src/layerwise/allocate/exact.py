"""From fractions to whole weights: counts that meet the budget to the last one."""

import math
from collections.abc import Mapping
from fractions import Fraction

from ..errors import BudgetError, ConfigError
from .bounds import Bound, bounds_of, check_feasible


def exact_counts(
    sparsities: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    low: Bound = 0.0,
    high: Bound = 1.0,
) -> dict[str, int]:
    """Name -> number of zeros, in the order of `sizes`; they sum to round(sparsity * total) exactly.

    Largest remainder: each layer gets the whole part of sparsity * size, the largest fractions one more. Of equal fractions the layer
    that comes first in `sizes` gets it, so hand `sizes` over in the order of the model; the order of `sparsities` is immaterial.
    Counts stay within [0, size] and the bounds, by less than one weight beyond them only where whole weights leave no other way.
    Raises BudgetError if the bounds do not allow the budget, or the sparsities do not amount to it (`water_fill` makes them).
    """
    if sparsities.keys() != sizes.keys():
        odd = sorted(sparsities.keys() ^ sizes.keys())
        raise ConfigError(f'exact_counts: sparsities and sizes name different layers, such as "{odd[0]}".')
    check_feasible(sizes, sparsity, low, high)
    total = sum(sizes.values())
    wanted = round(sparsity * total)
    exact = {name: sparsities[name] * size for name, size in sizes.items()}
    if not abs(math.fsum(exact.values()) - sparsity * total) <= 1 + 1e-9 * total:
        raise BudgetError(
            f"the layers' sparsities amount to {math.fsum(exact.values()):.10g} zeros of {total}, the target {sparsity:g} to {wanted}."
            " Fill them up to it with water_fill first."
        )
    # a bound means the decimal that was written: 0.29 of 100 is 29, though the float product is below it
    limits = {
        name: (Fraction(repr(least)) * sizes[name], Fraction(repr(most)) * sizes[name])
        for name, (least, most) in bounds_of(sizes, low, high).items()
    }
    inside = {name: (math.ceil(least), math.floor(most)) for name, (least, most) in limits.items()}
    outside = {name: (math.floor(least), math.ceil(most)) for name, (least, most) in limits.items()}
    whole = {name: (min(inside[name]), inside[name][1]) for name in sizes}  # no whole weight between the two bounds
    counts = {name: min(whole[name][1], max(whole[name][0], math.floor(exact[name]))) for name in sizes}
    _settle(counts, exact, wanted, whole)
    _settle(counts, exact, wanted, outside)
    return counts


def sparsities_of(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """Counts as the sparsities a plan holds: count / size, from which round(sparsity * size) gives the count back."""
    return {name: counts[name] / size if size else 0.0 for name, size in sizes.items()}


def _settle(
    counts: dict[str, int], exact: Mapping[str, float], wanted: int, limits: Mapping[str, tuple[int, int]]
) -> None:
    """Raise or lower counts one by one, the farthest from exact first, until they sum to `wanted` or all are at their limits."""
    while missing := wanted - sum(counts.values()):
        step = 1 if missing > 0 else -1
        # stable, and backwards to take away: of equals the first keeps the zero
        order = sorted(counts, key=lambda name: counts[name] - exact[name])[::step]
        movable = [name for name in order if limits[name][0] <= counts[name] + step <= limits[name][1]]
        if not movable:
            return
        for name in movable[: abs(missing)]:
            counts[name] += step
