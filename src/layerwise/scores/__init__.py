"""One number per layer or block, high = keep: a tensor kernel, and apart from it the walk that feeds it."""

from .outlier_ratio import outlier_ratio, outlier_share

__all__ = ["outlier_ratio", "outlier_share"]
