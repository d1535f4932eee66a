"""One number per layer or block, high = keep: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable
from functools import partial

from .block_influence import block_influence, mean_turn
from .outlier_ratio import outlier_ratio, outlier_share

# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
}

__all__ = ["SCORES", "block_influence", "mean_turn", "outlier_ratio", "outlier_share"]
