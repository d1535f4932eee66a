"""Sparsities that fall linearly with a score: added to the target (OWL, Yin et al. 2024, arXiv:2310.05175), or as a factor of it
(AlphaPruning, Lu et al. 2024, arXiv:2410.10912)."""

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
    _check_finite("linear_map", scores)
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


def linear_factors(scores: Mapping[str, float], spread: float) -> dict[str, float]:
    """Name -> factor of the mean sparsity: falls linearly with the score (high = keep) from 1 + `spread` to 1 - `spread`.

    `water_fill(..., by="scale")` makes them sparsities that meet a budget. Scores that are all equal get the factor 1. Raises ScoreError
    if a score is not finite.
    """
    _check_finite("linear_factors", scores)
    low, high = min(scores.values()), max(scores.values())
    if low == high:
        return dict.fromkeys(scores, 1.0)
    return {name: (high - score) / (high - low) * 2 * spread + 1 - spread for name, score in scores.items()}


def _check_finite(rule: str, scores: Mapping[str, float]) -> None:
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ScoreError(f'{rule}: the score of "{name}" is {score}. Scores must be finite.')
