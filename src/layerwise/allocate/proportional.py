"""Sparsities from a floor and a share of what is left: the rule of ECoFLaP (Sung et al. 2024, arXiv:2310.02998)."""

import math
from collections.abc import Mapping

from ..errors import ConfigError, ScoreError
from .bounds import Bound, bounds_of, check_feasible
from .fill import water_fill


def proportional(
    scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, low: Bound = 0.0, high: Bound = 1.0
) -> dict[str, float]:
    """Name -> sparsity within [low, high], mean `sparsity` by weight: every group keeps the least that `high` asks for, and the weights
    beyond that are shared out in proportion to the scores (>= 0, high = keep). A group that is full leaves its excess to the others.

    It is the number of weights that is proportional, not the density: of groups with equal scores the smaller end denser. A score of 0
    gets nothing beyond the floor, unless all others are full: then the rest is shared evenly by those of score 0, and all scores 0
    are one and the same. `exact_counts` makes whole weights of it.
    Raises ScoreError for a score that is negative or not finite, BudgetError saying what would be feasible.
    """
    for name, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise ScoreError(f'proportional: the score of "{name}" is {score}. Scores must be finite and at least 0.')
    if scores.keys() != sizes.keys():
        odd = sorted(scores.keys() ^ sizes.keys())
        raise ConfigError(f'proportional: scores and sizes name different groups, such as "{odd[0]}".')
    check_feasible(sizes, sparsity, low, high)
    filled = {name: size for name, size in sizes.items() if size}
    bounds = bounds_of(filled, low, high)
    room = {name: most - least for name, (least, most) in bounds.items()}
    floor = math.fsum(filled[name] * (1 - bounds[name][1]) for name in filled)
    extra = (1 - sparsity) * sum(filled.values()) - floor
    positive = {name: score for name, score in scores.items() if score > 0 and name in filled}
    most = math.fsum(filled[name] * room[name] for name in positive)
    shares = _shared(positive, filled, min(extra, most), room)
    if extra > most:
        rest = {name: 1.0 for name in filled if name not in positive}
        shares |= _shared(rest, filled, extra - most, room)
    return {name: bounds[name][1] - shares.get(name, 0.0) if name in bounds else sparsity for name in sizes}


def _shared(
    scores: Mapping[str, float], sizes: Mapping[str, int], weights: float, room: Mapping[str, float]
) -> dict[str, float]:
    """Name -> density beyond the floor, such that `weights` weights are kept beyond it together."""
    if not scores or weights <= 0:
        return dict.fromkeys(scores, 0.0)
    largest = max(scores.values())  # only quotients matter, and tiny scores must not become smaller yet
    densities = {name: score / largest / sizes[name] for name, score in scores.items()}
    inside = {name: sizes[name] for name in scores}
    return water_fill(densities, inside, weights, 0.0, {name: room[name] for name in scores}, by="scale")
