"""A matrix as block-diagonal factors around a sparse core: what ARMOR computes, the engine keeps, and factored folders store."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class Factors:
    """One matrix: weight = blockdiag(left) core blockdiag(right), the core with n of every m consecutive columns of a row.

    left: (rows / b, b, b), right: (columns / b, b, b), values: (rows, columns / m * n) the kept entries of the core row by row, all in
    the dtype that they are stored in. bits: (rows, ceil(columns / 8)) uint8, a bit for each column, lowest first, set where it is kept.
    """

    left: Tensor
    values: Tensor
    bits: Tensor
    right: Tensor
    n: int
    m: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        blocks = [tuple(one.shape) for one in (self.left, self.right)]
        if any(len(one) != 3 or one[1] != one[2] for one in blocks) or columns % self.m:
            raise ShapeError(
                f"factors of {rows} x {columns}: blocks are {blocks[0]} and {blocks[1]}, groups of {self.m}."
            )
        stored = (tuple(self.values.shape), tuple(self.bits.shape))
        wanted = ((rows, columns // self.m * self.n), (rows, -(-columns // 8)))
        if stored != wanted:
            raise ShapeError(
                f"factors of {rows} x {columns} in {self.n}:{self.m}: values and bits are {stored}, not {wanted}."
            )

    @classmethod
    def of(cls, left: Tensor, core: Tensor, keep: Tensor, right: Tensor, n: int, m: int) -> "Factors":
        """From a core with zeros. keep: bool, n of every m in each row."""
        return cls(left, core[keep].view(core.shape[0], -1), pack(keep), right, n, m)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.left.shape[0] * self.left.shape[1], self.right.shape[0] * self.right.shape[1]

    @property
    def keep(self) -> Tensor:
        """bool (rows, columns): where the core has its values."""
        return unpack(self.bits, self.shape[1])

    def core(self) -> Tensor:
        """(rows, columns) with its zeros, in the dtype of the values."""
        return spread_out(self.values, self.keep)

    def weight(self) -> Tensor:
        """The product, (rows, columns) float32 (float64 of float64 factors)."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        rows, columns = self.shape
        half = torch.bmm(self.left.to(wide), self.core().to(wide).view(*self.left.shape[:2], columns)).view(
            rows, columns
        )
        split = half.view(rows, *self.right.shape[:2]).transpose(0, 1)
        return torch.bmm(split, self.right.to(wide)).transpose(0, 1).reshape(rows, columns)

    @property
    def stored_bits(self) -> int:
        """What is stored, in bits: the kept values, a bit for every position of the core, both factors."""
        return sum(8 * one.element_size() * one.numel() for one in (self.left, self.values, self.bits, self.right))

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight of the matrix."""
        return self.stored_bits / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> "Factors":
        """The same on another device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})


PARTS = tuple(field.name for field in fields(Factors) if field.name not in ("n", "m"))
"""The tensors of factors."""


def pack(keep: Tensor) -> Tensor:
    """(rows, columns) bool -> (rows, ceil(columns / 8)) uint8, the first column in the lowest bit."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=keep.device)
    return (padded.view(keep.shape[0], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).view(bits.shape[0], -1)[:, :columns].bool()


def spread_out(values: Tensor, keep: Tensor) -> Tensor:
    """(rows, columns): the values in order where they are kept, zero elsewhere. Differentiable in the values."""
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)
