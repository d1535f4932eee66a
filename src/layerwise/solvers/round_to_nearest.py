"""Round to nearest: each weight becomes the nearest point of its group's grid. No data, no update of the others.

The grids are those of GPTQ (a whole zero) and Quanto (a float shift); see `grids.py` for what differs from the official code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ShapeError
from ..passes.statistics import InputStatistics, Need
from ..plan import GroupBits, Quantize
from .base import QUANTIZES, Solved, Treated, checked
from .codes import Codes
from .grids import Grid, GridName, ScaleName, bits_of_group, check_grid, fit, scale_dtype_of, steps_of
from .masking import check_weights, output_error


@dataclass(frozen=True)
class RoundToNearest:
    """The nearest code for every weight, in 2 to 8 bits."""

    name: ClassVar[str] = "round_to_nearest"
    needs: ClassVar[Need] = "none"
    treats: ClassVar[frozenset[str]] = QUANTIZES
    every_pattern: ClassVar[bool] = False

    grid: GridName = "integer"  # the zero is a code; "shift": any number, which packed formats cannot hold
    mse: bool = False  # search the range of each group for the least error; else it covers all weights
    scales: ScaleName = "auto"  # dtype that scales are stored in; auto: the model's where it has 16 bits, else float16

    def __post_init__(self) -> None:
        check_grid("RoundToNearest", self.grid, self.scales)

    @property
    def group_bits(self) -> GroupBits:
        """See `Solver`."""
        return bits_of_group(self.scales, shift=self.grid == "shift")

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights that are not finite."""
        check_weights(weights, inputs)
        shift, dtype = self.grid == "shift", scale_dtype_of(self.scales)
        solved = []
        for weight, one in zip(weights, checked(self, treatments), strict=True):
            assert one.quantize is not None  # noqa: S101  (checked: it does nothing else)
            grid = Grid(one.quantize.bits, one.quantize.symmetric, shift, self.mse, dtype)
            solved.append(quantized(weight, rounded(weight, one.quantize, grid), inputs))
        return solved


def rounded(weight: Tensor, quantize: Quantize, grid: Grid) -> Codes:
    """The nearest codes of a matrix (rows, columns), each group on a grid of its own."""
    groups = in_groups(weight, quantize.group)
    scale, zero = fit(groups, grid)
    return coded(weight, steps_of(groups, scale, zero, grid), scale, zero, quantize, grid)


def in_groups(weight: Tensor, group: int | None) -> Tensor:
    """(rows * groups, size). Raises ShapeError where groups do not divide the inputs."""
    check_groups(weight, group)
    return weight.reshape(-1, group or weight.shape[1])


def check_groups(weight: Tensor, group: int | None) -> None:
    """Raise ShapeError where groups do not divide the inputs of a matrix."""
    columns = weight.shape[1]
    if columns % (group or columns):
        raise ShapeError(
            f"{columns} inputs do not split into groups of {group}. Take a group that divides them, or null."
        )


def coded(weight: Tensor, steps: Tensor, scale: Tensor, zero: Tensor, quantize: Quantize, grid: Grid) -> Codes:
    """Codes of this matrix from its groups: steps (rows * groups, size), scale and zero (rows * groups,)."""
    rows = weight.shape[0]
    return Codes(
        steps.to(torch.uint8).reshape(weight.shape),
        scale.reshape(rows, -1),
        zero.reshape(rows, -1),
        quantize.bits,
        quantize.group,
        quantize.symmetric,
        grid.shift and not grid.symmetric,
        grid.scale_dtype,
    )


def quantized(
    weight: Tensor,
    codes: Codes,
    inputs: InputStatistics | None,
    keep: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> Solved:
    """The outcome from the codes. keep: where some weights were pruned first."""
    new = codes.weight()
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
    return Solved(new, kept, output_error(weight - new, inputs), notes, codes)
