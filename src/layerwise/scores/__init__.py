"""One number per layer or block, high = keep: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..structure import Structure
from ..tasks.batches import Batch
from .block_influence import block_influence, mean_turn
from .gradients import gradients, hessian_products, layer_means
from .grasp import gradient_flow, grasp_scores
from .outlier_ratio import outlier_ratio, outlier_share
from .snip import connection_sensitivity, snip_scores
from .synflow import synaptic_flow, synflow_scores


def _mean_of(
    scores: Callable[..., dict[str, Tensor]], model: nn.Module, data: Sequence[Batch], structure: Structure, **more: Any
) -> dict[str, float]:
    """Layer name -> mean of the scores of its weights."""
    return layer_means(scores(model, data, structure, **more))


# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
    "snip": partial(_mean_of, snip_scores),
    "grasp": partial(_mean_of, grasp_scores),
    "synflow": partial(_mean_of, synflow_scores),
}

__all__ = [
    "SCORES",
    "block_influence",
    "connection_sensitivity",
    "gradient_flow",
    "gradients",
    "grasp_scores",
    "hessian_products",
    "layer_means",
    "mean_turn",
    "outlier_ratio",
    "outlier_share",
    "snip_scores",
    "synaptic_flow",
    "synflow_scores",
]
