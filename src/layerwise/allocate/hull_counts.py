"""Blocks (or any whole units) taken out of layers at the least distortion per cost saved: lower convex hulls, one sort.

The Lagrangian rule: at the optimum every layer stands where a further unit costs the same distortion per cost saved. Segments of the
layers' hulls are taken in that order until the budget holds, the last one in part, so no slope is searched for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import BudgetError, ConfigError, ScoreError

Curves = Mapping[str, Sequence[float]]
"""Name -> distortion without 0, 1, ... units: one number more than there are units, from 0 up, in any unit that sums over names."""


def hull_counts(
    curves: Curves,
    saves: Mapping[str, float],
    wanted: float,
    *,
    worth: Mapping[str, float] | None = None,
    low: Mapping[str, int] | None = None,
    high: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Name -> how many units go, so that they save at least `wanted`, and putting back any one of them would save less.

    saves: what one unit of each name saves of the budget; names of which it is 0 lose nothing. worth: what distortion is divided by to
    rank, if it is not `saves`. low, high: counts for each name (None: 0, all). Falling curves count as level. Of equal slopes the
    name that comes first goes first.
    Raises BudgetError saying how much can be saved, ConfigError, ScoreError for distortions that are not finite.
    """
    worth = saves if worth is None else worth
    names = [name for name in curves if saves[name] > 0]
    _check(curves, saves, worth)
    if not math.isfinite(wanted):
        raise ConfigError(f"hull_counts: wanted={wanted}: give a finite number, what is to be saved.")
    least = {name: low[name] if low else 0 for name in curves}
    most = {name: high[name] if high else len(curves[name]) - 1 for name in curves}
    _check_bounds(curves, least, most)
    rising = {name: _running_maximum(curves[name]) for name in names}
    counts = {name: least[name] if name in names else 0 for name in curves}
    room = math.fsum(saves[name] * most[name] for name in names)
    slack = 1e-9 * max(abs(wanted), room)
    if wanted > room + slack:
        raise BudgetError(
            f"whole units can save {room:.10g}, the target is {wanted:.10g}. Raise the caps, or ask for less."
        )
    segments = [
        one for place, name in enumerate(names) for one in _segments(name, place, rising[name], least, most, worth)
    ]
    saved = math.fsum(saves[name] * counts[name] for name in names)
    for one in sorted(segments, key=lambda one: (one.slope, one.place, one.upto)):
        if saved >= wanted - slack:
            break
        needed = math.ceil((wanted - saved - slack) / saves[one.name])
        step = min(one.upto - counts[one.name], needed)
        counts[one.name] += step
        saved += step * saves[one.name]
    _put_back(counts, rising, saves, saved - wanted + slack, least)
    return counts


@dataclass(frozen=True)
class _Segment:
    """An edge of a hull: from the count before up to `upto`, `slope` of distortion per worth."""

    slope: float
    place: int
    upto: int
    name: str


def _segments(
    name: str,
    place: int,
    curve: Sequence[float],
    least: Mapping[str, int],
    most: Mapping[str, int],
    worth: Mapping[str, float],
) -> list[_Segment]:
    corners: list[int] = []
    for count in range(least[name], most[name] + 1):
        while len(corners) > 1 and _rise(curve, corners[-2], corners[-1]) >= _rise(curve, corners[-1], count):
            corners.pop()
        corners.append(count)
    return [_Segment(_rise(curve, before, upto) / worth[name], place, upto, name) for before, upto in pairwise(corners)]


def _rise(curve: Sequence[float], before: int, after: int) -> float:
    return (curve[after] - curve[before]) / (after - before)


def _put_back(
    counts: dict[str, int],
    curves: Curves,
    saves: Mapping[str, float],
    spare: float,
    least: Mapping[str, int],
) -> None:
    """Units of cheaper names that fit into what the last one saved beyond the target, the largest distortion per cost first."""
    while True:
        fitting = [name for name in curves if saves[name] <= spare and counts[name] > least[name]]
        if not fitting:
            return

        def gain(name: str) -> float:
            return (curves[name][counts[name]] - curves[name][counts[name] - 1]) / saves[name]

        name = max(fitting, key=gain)
        counts[name] -= 1
        spare -= saves[name]


def _running_maximum(curve: Sequence[float]) -> list[float]:
    highest, found = -math.inf, []
    for value in curve:
        highest = max(highest, value)
        found.append(highest)
    return found


def _check_bounds(curves: Curves, least: Mapping[str, int], most: Mapping[str, int]) -> None:
    for name, curve in curves.items():
        if not 0 <= least[name] <= most[name] < len(curve):
            raise ConfigError(
                f'hull_counts: "{name}" has {len(curve) - 1} units, of which {least[name]} to {most[name]} may go: give'
                " 0 <= low <= high, and no more than there are."
            )


def _check(curves: Curves, saves: Mapping[str, float], worth: Mapping[str, float]) -> None:
    for name, curve in curves.items():
        if not all(math.isfinite(value) for value in curve):
            raise ScoreError(f'the distortion of "{name}" is not finite. Check the statistics it is made from.')
        if not (saves[name] >= 0 and math.isfinite(saves[name]) and math.isfinite(worth[name])):
            raise ConfigError(f'hull_counts: a unit of "{name}" saves {saves[name]}: give finite numbers, at least 0.')
        if saves[name] > 0 and not worth[name] > 0:
            raise ConfigError(
                f'hull_counts: a unit of "{name}" is worth {worth[name]} and saves something: give more than 0.'
            )
