"""SNIP: how much the loss changes when a connection is switched off (Lee et al. 2019, arXiv:1810.02340)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..randomness import generator_for
from ..structure import Layer, Structure, from_matrices, parameter_of, structure_of
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from .gradients import gradients, weighed


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w * dL/dw| = |dL/dm| at a mask m of ones, any shape, float32; high = keep. The paper divides by the sum over all layers."""
    return (weight.float() * gradient.float()).abs()


def snip_scores(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    redraw: bool = False,
    seed: int = 0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> score of each of its weights, float32 in the stored shape. One forward and backward pass.

    redraw: score weights drawn anew (Xavier normal, every matrix that multiplies an input), so that the scores do not belong to
    the weights that will be trained; as Liu et al. 2022 (arXiv:2202.02643) do for densities. Errors as in `gradients`.
    Beside the model and its activations it takes 4 bytes for each weight, those of the scores, and a few times a layer; `redraw` as
    much again as the model.
    """
    weights = xavier_normal(model, seed) if redraw else {}
    found = gradients(model, data, structure, weights=weights, loss=loss)
    redrawn = {
        id(model.get_parameter(name)): values for name, values in weights.items()
    }  # a tied tensor has many names
    own = {layer.name: parameter_of(model, layer) for layer in structure}
    return weighed(connection_sensitivity, {n: redrawn.get(id(one), one) for n, one in own.items()}, found)


def xavier_normal(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Parameter name -> new values for every linear, convolution and expert of the model, each layer from a stream of its own.

    Deviation sqrt(2 / (fan in + fan out)); a convolution's fans count its kernel positions, as in `torch.nn.init`. The dtype and
    device of the parameter.
    """
    drawn = {}
    for layer in structure_of(model, include=["*"]):
        if layer.kind in ("embedding", "table"):
            continue
        deviation = math.sqrt(2 / (layer.columns + _fan_out(layer)))
        shape = (layer.matrices, layer.rows, layer.columns)
        values = torch.randn(shape, generator=generator_for(seed, f"xavier:{layer.name}")) * deviation
        drawn[layer.parameter] = from_matrices(values, layer).to(model.get_parameter(layer.parameter))
    return drawn


def _fan_out(layer: Layer) -> int:
    return layer.shape[0] * math.prod(layer.shape[2:]) if layer.kind == "conv" else layer.rows
