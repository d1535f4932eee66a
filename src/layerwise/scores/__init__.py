"""One number per layer or block, high = keep unless it is named in LOW_KEEPS: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..structure import Structure, groups_of
from ..tasks.batches import Batches
from .alpha_cache import alphas_kept
from .alpha_hill import LayerTail, Look, alpha_hill, layer_tail, layer_tails
from .block_influence import block_influence, mean_turn
from .first_order import first_order_gradient, gradient_mass
from .outlier_ratio import outlier_ratio, outlier_share
from .spectra import Windows, spectrum, window_spectrum
from .tail_fit import FITS, Fit, TailFit, fit_tail
from .watching import tell, watched
from .zeroth_order import central_slope, norm_from_slopes, zeroth_order_gradient


def over_blocks(
    score: Callable[..., dict[str, float]], model: nn.Module, data: Batches, structure: Structure, **settings: Any
) -> dict[str, float]:
    """Block name -> sum of a score of layers."""
    of_layers = score(model, data, structure, **settings)
    return {
        name: sum(of_layers[layer.name] for layer in layers) for name, layers in groups_of(structure, "block").items()
    }


def _alpha_hill(model: Any, data: Any, structure: Any) -> dict[str, float]:
    return alpha_hill(model, structure)


# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
    "zeroth-order": partial(over_blocks, zeroth_order_gradient),
    "first-order": partial(over_blocks, first_order_gradient),
    "alpha-hill": _alpha_hill,  # FARMS's defaults
}
WITHOUT_DATA = frozenset({"alpha-hill"})  # these look at weights alone: data may be None
LOW_KEEPS = frozenset({"alpha-hill"})  # the paper's own number, whose sign methods turn

__all__ = [
    "FITS",
    "LOW_KEEPS",
    "SCORES",
    "WITHOUT_DATA",
    "Fit",
    "LayerTail",
    "Look",
    "TailFit",
    "Windows",
    "alpha_hill",
    "alphas_kept",
    "block_influence",
    "central_slope",
    "first_order_gradient",
    "fit_tail",
    "gradient_mass",
    "layer_tail",
    "layer_tails",
    "mean_turn",
    "norm_from_slopes",
    "outlier_ratio",
    "outlier_share",
    "over_blocks",
    "spectrum",
    "tell",
    "watched",
    "window_spectrum",
    "zeroth_order_gradient",
]
