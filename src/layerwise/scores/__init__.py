"""One number per layer or block, high = keep: a tensor kernel, and apart from it the walk that feeds it."""

from .block_influence import block_influence, mean_turn
from .outlier_ratio import outlier_ratio, outlier_share

__all__ = ["block_influence", "mean_turn", "outlier_ratio", "outlier_share"]
