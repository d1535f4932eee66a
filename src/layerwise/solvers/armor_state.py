"""What an ARMOR fit works on, and the products that its steps share: every block of a matrix in one batched operation.

Block (i, j) of A S B depends on A_i, S_ij and B_j alone. With P_i = A_i^T A_i, Q_j = B_j D_j B_j^T and D the powers of the inputs, the
loss of a block is quadratic in its core: half its gradient is G = P_i S_ij Q_j - A_i^T W_ij D_j B_j^T.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..passes.statistics import widest


@dataclass(frozen=True)
class Target:
    """What is fitted. weight: (rows, columns), normalised. power: (columns,) > 0, of the inputs. block: side of the diagonal blocks.
    n of every m consecutive inputs of the core are kept."""

    weight: Tensor
    power: Tensor
    block: int
    n: int
    m: int

    @property
    def total(self) -> Tensor:
        """The loss of an all-zero weight, a float64 scalar (float32 on MPS)."""
        return weighed(self.weight, self.power)


@dataclass
class State:
    """left: (rows / b, b, b). core: (rows, columns), zero where not kept. right: (columns / b, b, b). keep: bool like the core."""

    left: Tensor
    core: Tensor
    right: Tensor
    keep: Tensor

    def copy(self) -> "State":
        return replace(
            self, left=self.left.clone(), core=self.core.clone(), right=self.right.clone(), keep=self.keep.clone()
        )

    def weight(self) -> Tensor:
        """A S B, (rows, columns)."""
        return times_right(times_left(self.left, self.core), self.right)


def start(target: Target, keep: Tensor) -> State:
    """A = I, B = I and the core the masked weight: the loss is that of the mask alone."""
    rows, columns = target.weight.shape
    eye = torch.eye(target.block, dtype=target.weight.dtype, device=target.weight.device)
    left, right = (eye.repeat(size // target.block, 1, 1) for size in (rows, columns))
    return State(left, target.weight.masked_fill(~keep, 0.0), right, keep.clone())


def times_left(left: Tensor, matrix: Tensor) -> Tensor:
    """blockdiag(left) @ matrix. left: (rows / b, b, b), matrix: (rows, columns)."""
    return torch.bmm(left, matrix.view(left.shape[0], left.shape[1], -1)).view(matrix.shape)


def times_right(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix @ blockdiag(right). right: (columns / b, b, b), matrix: (rows, columns)."""
    return torch.bmm(by_columns(matrix, right), right).transpose(0, 1).reshape(matrix.shape)


def by_columns(matrix: Tensor, right: Tensor) -> Tensor:
    """(columns / b, rows, b): a view of the matrix's blocks of columns."""
    return matrix.view(matrix.shape[0], right.shape[0], right.shape[1]).transpose(0, 1)


def residual(target: Target, state: State) -> Tensor:
    """W - A S B."""
    return target.weight - state.weight()


def weighed(matrix: Tensor, power: Tensor) -> Tensor:
    """sum_ij power_j matrix_ij^2, carried in the widest float of the device."""
    return (matrix.square().sum(0).to(widest(matrix.device)) * power).sum()


def loss(target: Target, state: State) -> Tensor:
    """sum_ij power_j (W - A S B)_ij^2."""
    return weighed(residual(target, state), target.power)


def core_gradient(target: Target, state: State, rest: Tensor) -> Tensor:
    """Half the gradient of the loss by every entry of the core, kept or not. rest: the residual."""
    return times_right(times_left(-state.left.mT, rest * target.power), state.right.mT)


def core_curvature(target: Target, state: State) -> tuple[Tensor, Tensor]:
    """P (rows / b, b, b) and Q (columns / b, b, b): a change of the core changes its half gradient by P change Q."""
    power = target.power.view(-1, 1, target.block)
    return torch.bmm(state.left.mT, state.left), torch.bmm(state.right * power, state.right.mT)


def block_sums(matrix: Tensor, block: int) -> Tensor:
    """(rows / b, columns / b): the sum over each block."""
    rows, columns = matrix.shape
    return matrix.view(rows // block, block, columns // block, block).sum((1, 3))


def by_block(matrix: Tensor, factor: Tensor, block: int) -> Tensor:
    """Each block of the matrix times its own factor. factor: (rows / b, columns / b)."""
    rows, columns = matrix.shape
    parts = matrix.view(rows // block, block, columns // block, block)
    return (parts * factor[:, None, :, None]).view(rows, columns)
