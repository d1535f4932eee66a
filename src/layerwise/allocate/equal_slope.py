"""LPViT's own allocation: the same slope of distortion in every layer, found by bisection (Xu et al. 2024, arXiv:2407.02068).

As the official code has it, faults included, so that its choices can be matched: derivatives by a five-point stencil whose half-widths are
cut short (wrong by up to 44 % where they are odd), slopes that take no account of what a layer costs, and an added power that grows with
pruning. `hull_counts` is the rule to use.
"""

import math
from collections.abc import Mapping, Sequence

from ..errors import BudgetError, ConfigError
from ..scores.block_taylor import kept_count


def smoothed(curve: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average along the curve, its start made up for: e_i = w e_(i-1) + (1 - w) D_i, over 1 - w^(i+1)."""
    if not 0 <= weight < 1:
        raise ConfigError(f"smoothed: weight={weight:g}: give 0 <= weight < 1.")
    average, found = 0.0, []
    for index, value in enumerate(curve):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight ** (index + 1)))
    return found


def stencil_slopes(curve: Sequence[float], spacing: float, half: int = 4) -> list[float]:
    """Derivative at every point but the last, with the official code's stencil: half-width min(half, i, m - 1 - i), its half truncated.

    Forward differences at the first two points, two-sided where the half-width is 1. For odd half-widths the weights do not fit.
    """
    last, slopes = len(curve) - 1, []
    for i in range(last):
        h = min(half, i, last - i)
        if i < 2:
            slopes.append((curve[i + 1] - curve[i]) / spacing)
        elif h == 1:
            slopes.append((curve[i + 1] - curve[i - 1]) / (2 * spacing))
        else:
            q = h // 2
            rise = -curve[i + h] + 8 * curve[i + q] - 8 * curve[i - q] + curve[i - h]
            slopes.append(rise / (6 * h * spacing))
    return slopes


def equal_slope(
    curves: Mapping[str, Sequence[float]],
    costs: Mapping[str, float],
    kept: float,
    *,
    half: int = 4,
    min_kept: float = 0.05,
    tolerance: float = 0.02,
    power: Mapping[str, float] | None = None,
    beta: float | None = None,
    survivors: bool = False,
    blocks: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Name -> fraction pruned, where the layer's slope is nearest to one for all; costs kept: `kept` of all, within `tolerance`.

    curves: distortion at m fractions from 0 to 1 in equal steps. costs: of each layer whole. power: of each layer whole; beta times
    what is pruned of it is added to the distortion, or with `survivors` times what is left. beta: None takes the official one, the mean of
    the steepest slopes over that of the powers. blocks: how many each layer has; what is kept then counts in whole ones, as
    `scores.taylor_keep` takes them. Raises BudgetError where no slope comes within the tolerance.
    """
    step = {name: 1 / (len(curve) - 1) for name, curve in curves.items()}
    if power is not None:
        if beta is None:
            steepest = [max(stencil_slopes(curve, step[name], 10)) for name, curve in curves.items()]
            beta = sum(steepest) / sum(power[name] for name in curves)
        sign = -beta if survivors else beta
        curves = {
            name: [value + sign * power[name] * i * step[name] for i, value in enumerate(curve)]
            for name, curve in curves.items()
        }
    slopes = {name: stencil_slopes(curve, step[name], half) for name, curve in curves.items()}
    most = 1 - min(min_kept, kept / 2)
    total = math.fsum(costs[name] for name in curves)

    def at(slope: float) -> dict[str, float]:
        found = {}
        for name, of in slopes.items():
            index = min(range(len(of)), key=lambda i: abs(of[i] - slope))
            found[name] = min(index * step[name], most)
        return found

    def left(name: str, gone: float) -> float:
        return 1 - gone if blocks is None else kept_count(gone, blocks[name]) / blocks[name]

    low, high, best = -100.0, 100.0, at(2.0**-100)
    for _ in range(40):
        middle = (low + high) / 2
        best = at(2.0**middle)
        got = math.fsum(costs[name] * left(name, gone) for name, gone in best.items()) / total
        if abs(got - kept) <= tolerance:
            return best
        low, high = (middle, high) if got > kept else (low, middle)
    raise BudgetError(
        f"equal slopes keep {got:.1%} of the cost, the target is {kept:.1%} within {tolerance:.1%}. Ask for less, take smaller blocks,"
        " or hulls (reference=false)."
    )
