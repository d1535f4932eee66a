"""Water-filling: move all shares together until they meet a total, none leaving its bounds."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

from ..errors import BudgetError, ConfigError, ScoreError
from .bounds import Bound, bounds_of


def water_fill(
    shares: Mapping[str, float],
    sizes: Mapping[str, int],
    total: float,
    low: Bound = 0.0,
    high: Bound = 1.0,
    *,
    by: Literal["shift", "scale"] = "shift",
) -> dict[str, float]:
    """Name -> share, such that sum(share * size) = total and low <= share <= high.

    by="shift": share + t, clipped; for linear maps, whose differences mean something. Any finite shares.
    by="scale": share * t, t >= 0, clipped; for proportional rules, whose quotients do. Shares >= 0; a share of 0 stays at its low.
    t is the same for all, so the order of the shares is kept. shares: fractions (sparsities or densities). total: in weights.
    Raises BudgetError, saying what would be feasible, if no t meets the total; ScoreError for shares that are not finite.
    """
    for name, share in shares.items():
        if not math.isfinite(share) or (by == "scale" and share < 0):
            raise ScoreError(f'water_fill: the share of "{name}" is {share}. Give finite shares, at least 0 to scale.')
    if shares.keys() != sizes.keys():
        odd = sorted(shares.keys() ^ sizes.keys())
        raise ConfigError(f'water_fill: shares and sizes name different layers, such as "{odd[0]}".')
    bounds = bounds_of(shares, low, high)
    lines = {name: (share, 1.0) if by == "shift" else (0.0, share) for name, share in shares.items()}

    def at(name: str, level: float) -> float:
        start, slope = lines[name]
        least, most = bounds[name]
        return min(most, max(least, start + slope * level if slope else start))

    def filled(level: float) -> float:
        return math.fsum(size * at(name, level) for name, size in sizes.items())

    # where a layer leaves its floor, and where it reaches its cap
    turns = {
        name: ((bounds[name][0] - start) / slope, (bounds[name][1] - start) / slope)
        for name, (start, slope) in lines.items()
        if slope
    }
    levels = sorted({level for pair in turns.values() for level in pair}) or [0.0]
    tolerance = 1e-9 * sum(sizes.values())
    if not filled(levels[0]) - tolerance <= total <= filled(levels[-1]) + tolerance:
        raise BudgetError(
            f"water_fill: within their bounds the {len(shares)} shares hold {filled(levels[0]):.10g} to"
            f" {filled(levels[-1]):.10g} of {sum(sizes.values())} weights, not the"
            f" total of {total:.10g}. Widen the bounds, or change the total."
        )
    after = bisect_left(levels, total, key=filled)  # between two turns the sum is linear in the level
    if after in (0, len(levels)):
        level = levels[max(0, after - 1)]
    else:
        before, level = levels[after - 1], levels[after]
        free = [name for name, (leaves, reaches) in turns.items() if leaves <= before and reaches >= level]
        slope = math.fsum(sizes[name] * lines[name][1] for name in free)
        if slope:
            fixed = math.fsum(sizes[name] * at(name, level) for name in sizes.keys() - set(free))
            exact = (total - fixed - math.fsum(sizes[name] * lines[name][0] for name in free)) / slope
            level = min(level, max(before, exact))
    return {name: at(name, level) for name in shares}
