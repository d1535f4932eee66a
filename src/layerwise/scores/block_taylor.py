"""LPViT's own score and distortion, from one gradient averaged over all samples (Xu et al. 2024, arXiv:2407.02068), as its code has them.

A block's score is the mean of |W * g| over it. Without some blocks a layer is thought to cost the mean of (delta * g)^2 plus a rank-one
quadratic form, which the code sums up along the curve with the new change where the old one belongs: what comes out is the form
itself plus the sum of the steps' squares, and depends on the steps. `block_fisher` is the score to use; this one matches published choices.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .block_fisher import Shape

DAMPING = 1e-7


def block_means(values: Tensor, shape: Shape) -> Tensor:
    """Means over blocks; those at the edge, which may be cut, over what they hold. (rows, columns) -> (block rows, block columns)."""
    return avg_pool2d(values[None, None], shape, shape, ceil_mode=True, count_include_pad=False)[0, 0]


def kept_count(gone: float, blocks: int) -> int:
    """How many of `blocks` stay when the fraction `gone` goes: at least one; rounded, where int((1 - 0.9) * 10) would be 0."""
    return max(1, min(blocks, round((1 - gone) * blocks)))


def taylor_keep(scores: Tensor, gone: float) -> Tensor:
    """The highest blocks, (block rows, block columns) -> bool; of equals the lower index stays. Nested as `gone` grows."""
    order = scores.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[: kept_count(gone, scores.numel())].cpu()] = True
    return keep.reshape(scores.shape)


def cropped(keep: Tensor, shape: Shape, rows: int, columns: int) -> Tensor:
    """The mask of a matrix from that of its blocks, those at the edge cut to it."""
    whole = keep.repeat_interleave(shape[0], 0).repeat_interleave(shape[1], 1)
    return whole[:rows, :columns]


def rank_one_costs(steps: Tensor, gradient: Tensor, official: bool = False) -> Tensor:
    """Q = (g . delta)^2 / 2 after each of several changes of a weight, (steps, n) of what each adds to delta -> (steps,) float64.

    official: plus the running sum of (g . step)^2, which is what the code's recursion computes. The damping's 1e-7 ||delta||^2 / 2 is in.
    """
    steps, gradient = steps.double(), gradient.double()
    along = steps @ gradient
    q = along.cumsum(0).square() / 2 + DAMPING / 2 * steps.cumsum(0).square().sum(1)
    return q + along.square().cumsum(0) if official else q


def official_curve(weight: Tensor, gradient: Tensor, shape: Shape, steps: int = 100) -> list[float]:
    """Distortion at fractions 0, 1/steps, ... 1 of the blocks gone, best blocks kept. weight, gradient: (rows, columns) float32."""
    scores = block_means((weight * gradient).abs(), shape)
    order = scores.flatten().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rank = cropped(
        place.reshape(scores.shape), shape, *weight.shape
    ).flatten()  # of each weight's block, 0 stays longest
    product = (weight * gradient).double().flatten()
    sums = [torch.zeros(len(order), dtype=torch.float64, device=weight.device).index_add_(0, rank, part)
            for part in (product, product.square(), weight.double().flatten().square())]  # fmt: skip
    found, along, steps_squared, kept_before = [], 0.0, 0.0, len(order)
    for step in range(steps + 1):
        kept = kept_count(step / steps, len(order))
        more = float(sums[0][kept:kept_before].sum())
        along, steps_squared, kept_before = along + more, steps_squared + more * more, kept
        first = float(sums[1][kept:].sum()) / weight.numel()
        found.append(first + along * along / 2 + steps_squared + DAMPING / 2 * float(sums[2][kept:].sum()))
    return found
