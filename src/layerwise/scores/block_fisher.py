"""What the loss feels of whole blocks of weights: the per-sample Fisher of blocks, for LPViT (Xu et al. 2024, arXiv:2407.02068).

With g_i the gradient of one sample's loss, z_ib = sum over block b of g_i * W is how much that sample's loss would change by without the
block, to first order. A set B of blocks costs Q(B) = (1/2N) sum_i (sum_{b in B} z_ib)^2: the quadratic form of the empirical Fisher, exact,
with what blocks do to each other. The gradient averaged over samples first, as the official code has it, is near zero at a trained
optimum and ranks blocks otherwise.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ScoreError
from ..structure import Structure, as_matrices
from ..tasks.batches import Batch, single_samples
from ..tasks.divergence import predictions
from ..tasks.losses import Loss, loss_of
from .first_order import half_scale
from .stage import Stage
from .watching import tell

Shape = tuple[int, int]
MOST_BYTES = 8 * 2**30  # of all z together


def block_products(weight: Tensor, gradient: Tensor, shape: Shape) -> Tensor:
    """z of one sample: sums of weight * gradient over blocks. (matrices, rows, columns) twice -> (blocks,) float32.

    shape: (rows, columns) of a block, which must divide the matrices. Blocks come matrix after matrix, row by row.
    """
    height, width = shape
    product = weight.float() * gradient.float()
    matrices, rows, columns = product.shape
    return product.reshape(matrices, rows // height, height, columns // width, width).sum((2, 4)).flatten()


def fisher_cost(z: Tensor, gone: Tensor) -> float:
    """Q of a set of blocks. z: (samples, blocks); gone: bool (blocks,), True where pruned. In nats where the loss is."""
    return float(z[:, gone].double().sum(1).square().mean() / 2)


def fisher_order(z: Tensor, greedy: bool = False, rounds: int = 128) -> Tensor:
    """Blocks in the order in which they go, (blocks,) int64; of equals the higher index first. z: (samples, blocks).

    By what each costs alone, (1/2N) sum_i z_ib^2. greedy: by what each adds to Q of those gone before it, which sees blocks that make up
    for each other; looked up anew `rounds` times, for every block where there are no more than that.
    """
    work = z.double()
    own, blocks = work.square().sum(0), z.shape[1]
    if not greedy:
        return _lowest_first(own)
    order, sums = [], torch.zeros(len(z), dtype=torch.float64)
    for start in range(0, blocks, step := -(-blocks // rounds) or 1):
        chosen = _lowest_first(own + 2 * (sums @ work))[: min(step, blocks - start)]
        sums += work[:, chosen].sum(1)
        own[chosen] = torch.inf
        order.append(chosen)
    return torch.cat(order)


def _lowest_first(values: Tensor) -> Tensor:
    """Their indices; of equals the higher first."""
    return len(values) - 1 - values.flip(0).argsort(stable=True)


def fisher_curve(z: Tensor, order: Tensor) -> Tensor:
    """Q without the first 0, 1, ... blocks of an order, (blocks + 1,) float64, from 0 on. It may fall: blocks make up for others."""
    curve = torch.zeros(z.shape[1] + 1, dtype=torch.float64)
    for sample in z:  # one at a time: in float64 all of them would be twice z
        curve[1:] += sample[order].double().cumsum(0).square_()
    return curve / (2 * len(z))


def block_fisher(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    shapes: Mapping[str, Shape],
    *,
    samples: int | None = None,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> z, (samples, blocks) float32 on the CPU, for the layers of `shapes`: layer name -> (rows, columns) of its blocks.

    A backward pass for each sample; gradients are made sums as soon as they are there, and freed. samples: the first so many, None all.
    A layer that the loss does not depend on has zeros. The model is left as it was. Raises ScoreError naming the layer if a gradient is
    not finite, ConfigError if the blocks are too many to hold, DataError without samples, and what the loss raises.
    """
    singles = single_samples(data, samples)
    layers = {layer.name: layer for layer in structure if layer.name in shapes}
    blocks = {name: layer.size // (shapes[name][0] * shapes[name][1]) for name, layer in layers.items()}
    if (taken := 4 * len(singles) * sum(blocks.values())) > MOST_BYTES:
        raise ConfigError(
            f"{len(singles)} samples x {sum(blocks.values())} blocks take {taken / 2**30:.0f} GiB of sums: take larger blocks or fewer"
            " samples."
        )
    z = {name: torch.zeros(len(singles), count) for name, count in blocks.items()}
    scale = half_scale(model)
    row = 0

    def take(name: str, weight: Tensor, gradient: Tensor) -> None:
        if name in layers:
            own, slope = (as_matrices(one.detach(), layers[name]) for one in (weight, gradient))
            z[name][row] = block_products(own, slope, shapes[name]).cpu() / scale

    with Stage(model, singles, structure, loss=loss, by_batch=False) as stage:
        for row, batch in enumerate(singles):
            tell(row, len(singles), f"sample {row}")
            stage.gradients(batch, row, take, scale)
    tell(len(singles), len(singles))
    for name, found in z.items():
        if not found.isfinite().all():
            raise ScoreError(f'layer "{name}": its gradient is not finite. Use float32 or bfloat16 weights.')
    return z


def squared_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of the squared logits: a loss without labels, which the official code back-propagates."""
    return predictions(model, batch)[0].float().square().mean()
