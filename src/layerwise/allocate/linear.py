"""Sparsities that fall linearly with a score: the map of OWL (Yin et al. 2024, arXiv:2310.05175)."""

import math
from collections.abc import Mapping

from ..errors import ConfigError, ScoreError


def linear_map(
    scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """Name -> sparsity: falls linearly with the score (high = keep), width 2 * `spread`, mean `sparsity` by weight.

    The width is always 2 * spread, so one side may lie farther than `spread` from the mean, and a sparsity outside [0, 1]:
    `water_fill` brings it back. Scores that are all equal get the same sparsity. Raises ScoreError if a score is not finite.
    """
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ScoreError(f'linear_map: the score of "{name}" is {score}. Scores must be finite.')
    if scores.keys() != sizes.keys():
        odd = sorted(scores.keys() ^ sizes.keys())
        raise ConfigError(f'linear_map: scores and sizes name different layers, such as "{odd[0]}".')
    low, high = min(scores.values()), max(scores.values())
    total = sum(sizes.values())
    if low == high or not total:
        return dict.fromkeys(scores, sparsity)
    extra = {name: (score - low) / (high - low) * 2 * spread for name, score in scores.items()}
    mean = math.fsum(extra[name] * sizes[name] for name in extra) / total
    return {name: sparsity - (extra[name] - mean) for name in extra}
