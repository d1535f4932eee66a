"""GraSP: how much removing a weight would weaken the flow of gradients (Wang et al. 2020, arXiv:2002.07376)."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..structure import Structure, parameter_of
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from .gradients import hessian_products, weighed


def gradient_flow(weight: Tensor, product: Tensor) -> Tensor:
    """w * Hg, any shape, float32; high = keep: the paper's score is -w * Hg and removes the highest. product: H g of the weight."""
    return weight.float() * product.float()


def grasp_scores(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    temperature: float = 200.0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> score of each of its weights, float32 in the stored shape; positive and negative.

    temperature: divides the logits, so that the loss is that of a network which knows nothing yet. Of as many batches as `data` has
    (the paper: two halves), g is the sum. Memory and errors as in `hessian_products`.
    """
    found = hessian_products(model, data, structure, temperature=temperature, loss=loss)
    return weighed(gradient_flow, {layer.name: parameter_of(model, layer) for layer in structure}, found)
