"""Floors and caps on the sparsity of layers, and whether a budget fits between them."""

import math
from collections.abc import Mapping

from ..errors import BudgetError, ConfigError

Bound = float | Mapping[str, float]
"""One bound for all layers, or one for each name."""


def bound_of(bound: Bound, name: str) -> float:
    """The bound of one layer."""
    return bound[name] if isinstance(bound, Mapping) else bound


def bounds_of(names: Mapping[str, object], low: Bound, high: Bound) -> dict[str, tuple[float, float]]:
    """Name -> (low, high). Raises ConfigError unless 0 <= low <= high <= 1 for every layer."""
    bounds = {name: (float(bound_of(low, name)), float(bound_of(high, name))) for name in names}
    for name, (least, most) in bounds.items():
        if not 0 <= least <= most <= 1:
            raise ConfigError(f'"{name}": bounds {least:g} to {most:g}: give 0 <= low <= high <= 1.')
    return bounds


def check_feasible(sizes: Mapping[str, int], sparsity: float, low: Bound = 0.0, high: Bound = 1.0) -> None:
    """Raise BudgetError, saying what would be feasible, unless `sparsity` of all weights can go within the bounds.

    sizes: weights of each layer. low, high: sparsities; a layer whose high is 0 stays dense.
    """
    if not 0 <= sparsity <= 1:
        raise ConfigError(f"sparsity={sparsity:g}: give the fraction removed, 0 <= sparsity <= 1.")
    bounds, total = bounds_of(sizes, low, high), sum(sizes.values())
    wanted, tolerance = sparsity * total, 1e-9 * total
    if wanted > math.fsum(size * bounds[name][1] for name, size in sizes.items()) + tolerance:
        raise BudgetError(_too_much(sizes, sparsity, {name: most for name, (_, most) in bounds.items()}))
    least = math.fsum(size * bounds[name][0] for name, size in sizes.items())
    if wanted < least - tolerance:
        floor = max(lowest for lowest, _ in bounds.values())
        raise BudgetError(
            f"at least {_percent(least / total)} must go (min_sparsity={floor:g}), target {_percent(sparsity)}."
            f" Lower min_sparsity to {_down(sparsity):g}, or raise the sparsity to {_up(least / total):g}."
        )


def _too_much(sizes: Mapping[str, int], sparsity: float, highs: Mapping[str, float]) -> str:
    """Why so much cannot go, and which cap, or else which target, would do."""
    total, cap = sum(sizes.values()), max(highs.values())
    # the caps of their own that some layers have stay; the common one is what may be raised
    others = math.fsum(sizes[name] * most for name, most in highs.items() if most < cap)
    room = sum(sizes[name] for name, most in highs.items() if most == cap)
    dense = sum(most == 0 for most in highs.values())
    why = [f"max_sparsity={cap:g}"] if cap < 1 else []
    why += [f"{dense} of {len(sizes)} layers stay dense"] if dense else []
    needed = (sparsity * total - others) / room if room else math.inf
    if cap and needed <= 1:
        advice = f"Raise max_sparsity to {_up(needed):g}."
    else:
        feasible = (others + room) / total if cap else 0.0
        advice = f"Lower the sparsity to {_down(feasible):g}" + (", or let fewer layers stay dense." if dense else ".")
    can_go = (others + room * cap) / total
    reason = f" ({', '.join(why)})" if why else ""
    return f"{_percent(can_go)} can go{reason}, target {_percent(sparsity)}. {advice}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _up(fraction: float) -> float:
    return min(1.0, math.ceil(fraction * 1000 - 1e-6) / 1000)


def _down(fraction: float) -> float:
    return max(0.0, math.floor(fraction * 1000 + 1e-6) / 1000)
