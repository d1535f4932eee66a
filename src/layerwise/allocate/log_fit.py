"""Widths for densities that are given layer by layer: least squares in logarithms, then one factor for all until the budgets hold.

One group touches layers that ask for different densities, so that they cannot all have theirs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ConfigError
from .joint_widths import Program, Vector, check_least


def fitted_widths(
    program: Program,
    densities: Sequence[float],
    budgets: Sequence[float],
    low: Mapping[str, float],
    high: Mapping[str, float],
    full: Mapping[str, float],
) -> dict[str, float]:
    """Group -> width, a share of a unit allowed: minimises the sum over layers of (log of what the widths make of its density - log of what
    it asks for) squared, widths at most `high`; then every group below `high` is multiplied by one number, bounds kept, so that the
    budgets just hold. Where no such number does, groups at `high` join them.

    densities: above 0, in the order of the program's layers. full: widths at density 1. Sides that are sums of groups count their groups
    by their shares at full width.
    """
    limits = np.array(budgets, dtype=np.float64)
    lows, highs, fulls = (np.array([b[name] for name in program.names], dtype=np.float64) for b in (low, high, full))
    if len(densities) != program.costs.shape[1] or min(densities) <= 0:
        raise ConfigError("fitted_widths: give a density above 0 for each layer.")
    check_least(program, limits, lows)
    sizes = program.fixed + program.parts @ fulls
    shares = (program.parts / sizes[:, :, None]).sum(
        0
    ) * fulls  # (layers, groups): by how much log size follows log width
    ceiling = np.log(highs / fulls)
    # distances below the ceiling are at least 0
    below = nonnegative_least_squares(shares, shares @ ceiling - np.log(np.array(densities, dtype=np.float64)))
    wanted = np.exp(ceiling - below) * fulls
    free = below > 1e-12
    found = np.clip(wanted, lows, highs)
    for moved in (free, np.ones_like(free)):
        found = _shifted(program, limits, lows, highs, np.clip(wanted, lows, highs), moved)
        if (program.spent(found) <= limits * (1 + 1e-9)).all():
            break
    return dict(zip(program.names, found.tolist(), strict=True))


def _shifted(
    program: Program,
    limits: Vector,
    lows: Vector,
    highs: Vector,
    wanted: Vector,
    moved: "np.ndarray[tuple[int], np.dtype[np.bool_]]",
) -> Vector:
    """The largest factor on `moved` at which the budgets hold; the smallest of all where none does."""

    def at(shift: float) -> Vector:
        return np.where(moved, np.clip(wanted * np.exp(shift), lows, highs), wanted)

    reach = float(np.log((highs / lows).max())) + 1.0
    low, high = -reach, reach
    if (program.spent(at(high)) <= limits).all():
        return at(high)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (program.spent(at(middle)) <= limits).all() else (low, middle)
    return at(low)


def nonnegative_least_squares(matrix: Vector, target: Vector) -> Vector:
    """x >= 0 of least |matrix x - target|, by active sets (Lawson and Hanson 1974, chapter 23); of several, one."""
    count = matrix.shape[1]
    x, positive = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(matrix).max()) * float(np.abs(target).max(initial=0.0)))
    for _ in range(10 * count):
        slope = matrix.T @ (target - matrix @ x)
        slope[positive] = -np.inf
        if slope.max() <= tolerance:
            break
        positive[int(slope.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[positive] = np.linalg.lstsq(matrix[:, positive], target, rcond=None)[0]
            if (trial[positive] > 0).all():
                break
            down = positive & (trial <= 0)
            share = float((x[down] / (x[down] - trial[down])).min())
            x = x + share * (trial - x)
            positive &= x > 1e-14
            x[~positive] = 0.0
        x = trial
    return x
