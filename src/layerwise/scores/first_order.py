"""How much the loss feels a layer, from gradients: the first-order score of ECoFLaP (Sung et al. 2024, arXiv:2310.02998).

One backward pass a batch. Each layer's gradient is made a number as soon as it is there and freed, so a second copy of the model's
gradients never exists; activations are kept as in training.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ScoreError
from ..passes import reached
from ..passes.wrapping import not_reached
from ..structure import Structure
from ..tasks.batches import Batches, first_samples
from ..tasks.losses import Loss, loss_of
from .stage import Stage
from .watching import tell

Kind = Literal["magnitude", "square", "gradient", "norm"]

_HALF_SCALE = 1024.0


def gradient_mass(weight: Tensor, gradient: Tensor, kind: Kind) -> float:
    """One number from a layer's gradient in one batch, float32 sums of any shape; high = keep.

    magnitude: sum |W| |G| (the paper's first-order score). square: sum W^2 G^2 (diagonal Fisher). gradient: sum |G|. norm: Frobenius.
    Their means over batches are the official scores, which take the mean of |G| or G^2 first and sum afterwards.
    """
    if kind == "norm":
        return float(gradient.float().norm())
    size = gradient.float().abs() if kind == "gradient" else (weight.float() * gradient.float()).abs()
    return float((size.square() if kind == "square" else size).sum())


def first_order_gradient(
    model: nn.Module,
    data: Batches,
    structure: Structure,
    *,
    kind: Kind = "magnitude",
    samples: int | None = None,
    loss: Loss = loss_of,
) -> dict[str, float]:
    """Layer name -> `gradient_mass` averaged over batches; high = keep.

    samples: use the first batches that hold so many, None all. Gradients of batch means: compare only scores made with equal batches.
    The model's own gradients, requires_grad, mode and random state are left as they were.
    Raises ScoreError naming the layer if a gradient is not finite or cannot be had, WalkError if no batch reaches a block, and what
    `loss` raises.
    """
    chosen = first_samples(data, samples)
    sums = dict.fromkeys((layer.name for layer in structure), 0.0)
    scale = half_scale(model)

    def take(name: str, weight: Tensor, gradient: Tensor) -> None:
        mass = gradient_mass(weight.detach(), gradient.float() / scale, kind)
        if not math.isfinite(mass):
            raise ScoreError(f'layer "{name}": its gradient is not finite. Use float32 or bfloat16 weights.')
        sums[name] += mass

    with Stage(model, chosen, structure, loss=loss, by_batch=False) as stage, reached(model, structure) as met:
        for index, batch in enumerate(chosen):
            tell(index, len(chosen), f"batch {index}")
            stage.gradients(batch, index, take, scale)
    tell(len(chosen), len(chosen))
    if missed := [block.name for block in structure.blocks if block.layers and block.name not in met]:
        raise not_reached(missed[0])
    return {name: total / len(chosen) for name, total in sums.items()}


def half_scale(model: nn.Module) -> float:
    """What to multiply a loss with, since float16 gradients of a mean loss lie near its smallest numbers; 1 for other models."""
    return _HALF_SCALE if any(one.dtype == torch.float16 for one in model.parameters()) else 1.0
