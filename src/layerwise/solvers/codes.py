"""A matrix as codes on a grid: what quantizing solvers compute, the engine keeps, and packed formats store."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError
from ..treatments import GroupBits


@dataclass(frozen=True)
class Codes:
    """One matrix on a grid: weight = (values - zero) * scale, per row and group of consecutive inputs.

    values: (rows, columns) uint8, 0 to 2^bits - 1. scale: (rows, groups) float32 > 0, already rounded to `scale_dtype`.
    zero: (rows, groups) float32, the code that means 0: whole numbers from 0 to 2^bits - 1, unless `shift`: then any number, of which
    -zero * scale, the weight of code 0, is what a format would store in `scale_dtype`. group: inputs that share a scale; None: one
    scale per row. symmetric: zero == 2^(bits - 1) everywhere, so that no format needs to store it.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int | None
    symmetric: bool
    shift: bool = False
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        groups = 1 if self.group is None else columns // self.group
        if groups * (self.group or columns) != columns or tuple(self.scale.shape) != (rows, groups):
            raise ShapeError(
                f"codes of {rows} x {columns} in groups of {self.group}: scales are {tuple(self.scale.shape)}, not ({rows}, {groups})."
            )
        if self.zero.shape != self.scale.shape:
            raise ShapeError(f"codes: zeros are {tuple(self.zero.shape)}, scales {tuple(self.scale.shape)}.")

    def weight(self) -> Tensor:
        """(rows, columns) float32."""
        rows, groups = self.scale.shape
        values = self.values.reshape(rows, groups, -1).float()
        return ((values - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).reshape(self.values.shape)

    @property
    def bits_per_weight(self) -> float:
        """True bits: a code, and its share of the bits of scale and zero."""
        return true_bits(
            self.bits,
            self.group or self.values.shape[1],
            symmetric=self.symmetric,
            shift=self.shift,
            scale_bits=torch.finfo(self.scale_dtype).bits,
        )

    def to(self, device: torch.device | str) -> "Codes":
        """The same on another device."""
        return replace(self, values=self.values.to(device), scale=self.scale.to(device), zero=self.zero.to(device))


def stacked(codes: list[Codes]) -> Codes:
    """The codes of matrices of one layer (experts, groups of a convolution) as those of one matrix, row under row."""
    first = codes[0]
    if len(codes) == 1:
        return first
    return replace(
        first,
        values=torch.cat([one.values for one in codes]),
        scale=torch.cat([one.scale for one in codes]),
        zero=torch.cat([one.zero for one in codes]),
    )


def rows_of(codes: Codes, rows: slice) -> Codes:
    """The codes of some rows, sharing memory: the inverse of `stacked`."""
    return replace(codes, values=codes.values[rows], scale=codes.scale[rows], zero=codes.zero[rows])


def true_bits(bits: int, group: int, *, symmetric: bool = False, shift: bool = False, scale_bits: int = 16) -> float:
    """Bits per weight with scale and zero counted: 4 bits in symmetric groups of 128 are 4.125.

    group: weights that share a scale (all inputs of a row, where rows have one scale). A whole zero takes `bits` bits, a float shift as
    many as the scale, a symmetric grid none.
    """
    return bits + GroupBits(scale_bits, shift).of(bits, symmetric=symmetric) / group
