"""One number per layer or block, high = keep: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..structure import Structure, groups_of
from ..tasks.batches import Batches
from .block_influence import block_influence, mean_turn
from .first_order import first_order_gradient, gradient_mass
from .outlier_ratio import outlier_ratio, outlier_share
from .zeroth_order import central_slope, norm_from_slopes, zeroth_order_gradient


def over_blocks(
    score: Callable[..., dict[str, float]], model: nn.Module, data: Batches, structure: Structure, **settings: Any
) -> dict[str, float]:
    """Block name -> sum of a score of layers."""
    of_layers = score(model, data, structure, **settings)
    return {
        name: sum(of_layers[layer.name] for layer in layers) for name, layers in groups_of(structure, "block").items()
    }


# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
    "zeroth-order": partial(over_blocks, zeroth_order_gradient),
    "first-order": partial(over_blocks, first_order_gradient),
}

__all__ = [
    "SCORES",
    "block_influence",
    "central_slope",
    "first_order_gradient",
    "gradient_mass",
    "mean_turn",
    "norm_from_slopes",
    "outlier_ratio",
    "outlier_share",
    "over_blocks",
    "zeroth_order_gradient",
]
