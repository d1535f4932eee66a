"""Gradients of a loss with respect to the weights of chosen layers, and the Hessian times them; the model is left as it was.

Batch norms normalise by the batch, as they do before any training, when their running statistics mean nothing; all else is in
evaluation mode, without dropout. Each gradient is added to what is asked for as soon as it is there, and freed.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ScoreError
from ..structure import Structure
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from .stage import Stage, Take, handed_over
from .watching import part, tell


def gradients(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    weights: Mapping[str, Tensor] | None = None,
    temperature: float = 1.0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> gradient of the loss, float32 in the stored shape, summed over the batches; zeros where the loss does not look.

    weights: parameter name -> values to use instead of the model's. temperature: divides the logits before the loss. Beside the model
    and its activations it holds the result, 4 bytes for each weight, and one layer's gradient; of a float16 model, which is computed in
    float32, 4 bytes more.
    Raises DataError without batches, ModelError for a model that is not in memory, WalkError naming the batch it cannot run on, and what
    the loss raises; ScoreError naming the layer where a gradient is not finite.
    """
    with Stage(model, data, structure, weights=weights, temperature=temperature, loss=loss, wide=True) as stage:
        total = stage.zeros()
        for index, batch in enumerate(data):
            tell(index, len(data), f"gradient of batch {index}")
            stage.gradients(batch, index, _adding_to(total))
    tell(len(data), len(data))
    return _finite(total)


def hessian_products(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    temperature: float = 1.0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> H g, float32 in the stored shape: g and H are gradient and Hessian of the loss summed over the batches.

    A second backward pass through the first, batch by batch. Beside the model and the two passes' activations it takes 12 bytes for each
    weight (8 in half precision) and a few times a layer: g, the result, and what the first pass adds to it before the second
    comes there. Errors as in `gradients`, and ScoreError for a model with an
    operation that cannot be differentiated twice.
    """
    with part(0, 2):
        g = gradients(model, data, structure, temperature=temperature, loss=loss)
    # the fused attention kernels have no second derivative
    with (
        part(1, 2),
        Stage(model, data, structure, temperature=temperature, loss=loss, wide=True) as stage,
        sdpa_kernel(SDPBackend.MATH),
    ):
        for name, leaf in stage.leaves.items():
            g[name] = g[name].to(leaf.dtype)
        total = stage.zeros()
        for index, batch in enumerate(data):
            tell(index, len(data), f"curvature of batch {index}")
            try:
                _add_product(stage, stage.loss(batch, index), g, total)
            except RuntimeError as error:
                if not any(word in str(error) for word in ("derivative", "differentiate", "double backward")):
                    raise
                raise ScoreError(
                    f"{type(model).__name__} has an operation that cannot be differentiated twice: {str(error).splitlines()[0]}"
                ) from error
        tell(len(data), len(data))
    return _finite(total)


def weighed(
    kernel: Callable[[Tensor, Tensor], Tensor], weights: Mapping[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Layer name -> kernel(weight, what was found for it), put where it was found, so that only one layer has both."""
    for name in found:
        found[name] = kernel(weights[name].detach(), found[name])
    return found


def layer_means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer name -> mean score of its weights: one number for tables and plans."""
    return {name: float(score.cpu().mean(dtype=torch.float64)) for name, score in scores.items()}


def _add_product(stage: Stage, value: Tensor, g: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> None:
    """Add what one batch's loss gives to H g: back through where its gradients come from, with g in their place."""
    leaves = list(stage.leaves.values())
    first = torch.autograd.grad(value, leaves, allow_unused=True, create_graph=True)
    met = {name: one for name, one in zip(stage.leaves, first, strict=True) if one is not None and one.requires_grad}
    edges, along = [get_gradient_edge(one) for one in met.values()], [g[name] for name in met]
    del first, met  # what they are is not needed
    if edges:  # a loss that is linear in the weights has no curvature
        with handed_over(stage.leaves, _adding_to(total)):
            torch.autograd.backward(edges, along, inputs=leaves)


def _adding_to(total: Mapping[str, Tensor]) -> Take:
    def add(name: str, weight: Tensor, gradient: Tensor) -> None:
        total[name].add_(gradient)

    return add


def _finite(total: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, gradient in total.items():
        if not torch.isfinite(gradient.sum()) and not gradient.isfinite().all():
            raise ScoreError(
                f'layer "{name}": its gradient is not finite. Check the weights and the data for overflow.'
            )
    return total
