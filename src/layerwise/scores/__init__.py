"""One number per layer or block, high = keep unless it is named in LOW_KEEPS: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..structure import Structure, groups_of
from ..tasks.batches import Batch, Batches
from .alpha_cache import alphas_folder, alphas_kept
from .alpha_hill import LayerTail, Look, alpha_hill, layer_tail, layer_tails
from .attention_error import AttentionError, Pair, all_pairs, attention_errors, decoder_config
from .block_fisher import block_fisher, block_products, fisher_cost, fisher_curve, fisher_order, squared_outputs
from .block_influence import block_influence, mean_turn
from .block_taylor import block_means, official_curve, rank_one_costs, taylor_keep
from .first_order import first_order_gradient, gradient_mass
from .gradients import gradients, hessian_products, layer_means
from .grasp import gradient_flow, grasp_scores
from .input_modification import input_modification, negative_cosine
from .outlier_ratio import outlier_ratio, outlier_share
from .output_error import output_error, output_gradients
from .snip import connection_sensitivity, snip_scores
from .spectra import Windows, spectrum, window_spectrum
from .synflow import synaptic_flow, synflow_scores
from .tail_fit import FITS, Fit, TailFit, fit_tail
from .watching import tell, watched
from .z_score import share_above, z_score
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


def _z_score(model: Any, data: Any, structure: Any) -> dict[str, float]:
    return z_score(model, structure)


def _mean_of(
    scores: Callable[..., dict[str, Tensor]], model: nn.Module, data: Sequence[Batch], structure: Structure, **more: Any
) -> dict[str, float]:
    """Layer name -> mean of the scores of its weights."""
    return layer_means(scores(model, data, structure, **more))


# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
    "input-modification": input_modification,
    "z-score": _z_score,
    "zeroth-order": partial(over_blocks, zeroth_order_gradient),
    "first-order": partial(over_blocks, first_order_gradient),
    "alpha-hill": _alpha_hill,  # FARMS's defaults
    "snip": partial(_mean_of, snip_scores),
    "grasp": partial(_mean_of, grasp_scores),
    "synflow": partial(_mean_of, synflow_scores),
}
WITHOUT_DATA = frozenset({"alpha-hill", "z-score"})  # these look at weights alone: data may be None
LOW_KEEPS = frozenset({"alpha-hill", "z-score"})  # the papers' own numbers, whose sign methods turn

__all__ = [
    "FITS",
    "LOW_KEEPS",
    "SCORES",
    "WITHOUT_DATA",
    "AttentionError",
    "Fit",
    "LayerTail",
    "Look",
    "Pair",
    "TailFit",
    "Windows",
    "all_pairs",
    "alpha_hill",
    "alphas_folder",
    "alphas_kept",
    "attention_errors",
    "block_fisher",
    "block_influence",
    "block_means",
    "block_products",
    "central_slope",
    "connection_sensitivity",
    "decoder_config",
    "first_order_gradient",
    "fisher_cost",
    "fisher_curve",
    "fisher_order",
    "fit_tail",
    "gradient_flow",
    "gradient_mass",
    "gradients",
    "grasp_scores",
    "hessian_products",
    "input_modification",
    "layer_means",
    "layer_tail",
    "layer_tails",
    "mean_turn",
    "negative_cosine",
    "norm_from_slopes",
    "official_curve",
    "outlier_ratio",
    "outlier_share",
    "output_error",
    "output_gradients",
    "over_blocks",
    "rank_one_costs",
    "share_above",
    "snip_scores",
    "spectrum",
    "squared_outputs",
    "synaptic_flow",
    "synflow_scores",
    "taylor_keep",
    "tell",
    "watched",
    "window_spectrum",
    "z_score",
    "zeroth_order_gradient",
]
