"""ARMOR's continuous steps as minimisers: A, then B, exactly; the core by conjugate gradients. None of them can raise the loss.

With Z = S B and Y = A S (rows and columns of a block), each factor is a weighted least squares of its own:
A_i += (W_i - A_i Z) D Z^T (Z D Z^T + lam I)^-1, B_j += (Y^T Y + lam I)^-1 Y^T (W_j - Y B_j), in which D_j cancels. The ridge pulls
towards the present factor, so that the step stays a descent whatever lam.
"""

import torch
from torch import Tensor

from ..passes.statistics import widest
from .armor_state import State, Target, block_sums, by_block, by_columns, times_left, times_right

RIDGE = 1e-6  # share of the mean of the diagonal


def fit_left(target: Target, state: State) -> None:
    """The best A for this core and B, in place."""
    blocks, block, _ = state.left.shape
    rows = times_right(state.core, state.right)
    weighed = (rows * target.power).view(blocks, block, -1)
    gram = torch.bmm(weighed, rows.view(blocks, block, -1).mT)
    wanted = torch.bmm(target.weight.view(blocks, block, -1), weighed.mT)
    state.left += _solve(gram, (wanted - torch.bmm(state.left, gram)).mT).mT


def fit_right(target: Target, state: State) -> None:
    """The best B for this A and core, in place."""
    columns = by_columns(times_left(state.left, state.core), state.right)
    gram = torch.bmm(columns.mT, columns)
    wanted = torch.bmm(columns.mT, by_columns(target.weight, state.right))
    state.right += _solve(gram, wanted - torch.bmm(gram, state.right))


def _solve(gram: Tensor, wanted: Tensor) -> Tensor:
    """(gram + lam I)^-1 wanted for each block; zero, no step, where the gram is nothing or cannot be factorised."""
    wide = gram.to(widest(gram.device))
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
    alive = mean > 0
    ridge = torch.where(alive, RIDGE * mean, 1.0)
    damped = wide + torch.diag_embed(ridge.unsqueeze(-1).expand(wide.shape[:-1]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    step = torch.cholesky_solve(wanted.to(wide.dtype), factor)
    sound = alive & (failed == 0) & step.isfinite().all(-1).all(-1)
    return torch.where(sound[:, None, None], step, 0.0).to(gram.dtype)


def fit_core(state: State, gradient: Tensor, curvature: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """`steps` of preconditioned conjugate gradients on the kept entries of the core, in place, each block for itself.

    gradient: half the gradient by every entry; returned as it is afterwards.
    """
    left, right = curvature
    block = left.shape[1]
    diagonal = left.diagonal(dim1=-2, dim2=-1).reshape(-1, 1) * right.diagonal(dim1=-2, dim2=-1).reshape(1, -1)
    scale = torch.where(state.keep & (diagonal > 0), 1 / diagonal, 0.0)  # nothing moves where nothing is kept or counts
    step = -scale * gradient
    descent = -block_sums(step * gradient, block)  # r^T M^-1 r
    for left_over in range(steps - 1, -1, -1):
        moved = times_right(times_left(left, step), right)
        length = _ratio(descent, block_sums(step * moved, block))
        state.core += by_block(step, length, block)
        gradient = gradient + by_block(moved, length, block)
        if left_over:
            new = -scale * gradient
            before, descent = descent, -block_sums(new * gradient, block)
            step = new + by_block(step, _ratio(descent, before), block)
    return gradient


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
