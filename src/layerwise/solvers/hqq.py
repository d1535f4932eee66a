"""HQQ: half-quadratic quantization (Badri & Shaji 2023; github.com/mobiusml/hqq). No data.

The scale stays as the range of the group gives it; the zero, any number, moves so that codes and weights agree on average, large errors
counting less. Departures from the official code: D1 each group keeps its best zero and the loop ends when no group gets better (the
official default loop has no rollback: it ends one or two updates past the best, and a bad group ends it for all). D2 no limits in
absolute weight units on the scale (official: 1 where the range is below 1e-4, never below 1 / 20000). D3 scale and zero are rounded
as they will be stored in every round, so the best is the best of what is stored.
The shrinkage of errors is in weight units, as published: for errors below (1/beta)^(1/(2-p)) = 0.17, which is all of most models, it is
zero, and each update is the zero of least squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..passes.statistics import InputStatistics, Need
from ..plan import GroupBits
from .base import QUANTIZES, Solved, Treated, checked
from .grids import Grid, ScaleName, bits_of_group, check_grid, fit, scale_dtype_of, shift_zero, steps_of
from .masking import check_weights
from .round_to_nearest import coded, in_groups, quantized

CHUNK = 1 << 18  # weights whose zeros are sought at once: they stay in the cache over all rounds


@dataclass(frozen=True)
class HQQ:
    """The nearest codes on grids whose zeros were moved to fit, in 2 to 8 bits, asymmetric."""

    name: ClassVar[str] = "hqq"
    needs: ClassVar[Need] = "none"
    treats: ClassVar[frozenset[str]] = QUANTIZES
    every_pattern: ClassVar[bool] = False
    every_grid: ClassVar[bool] = False

    p: float = 0.7  # of the norm that errors are shrunk by
    beta: float = 10.0  # the larger, the less they are shrunk
    rounds: int = 20  # at most
    scales: ScaleName = "auto"  # dtype that scales and zeros are stored in; auto: the model's where it has 16 bits

    def __post_init__(self) -> None:
        check_grid("HQQ", "shift", self.scales)
        if not 0 < self.p < 2 or not self.beta > 0:
            raise ConfigError(f"HQQ.p={self.p}, beta={self.beta}: give 0 < p < 2 and beta above 0.")
        if self.rounds < 0:
            raise ConfigError(f"HQQ.rounds={self.rounds}: give how often zeros may move, 0 or more.")

    @property
    def group_bits(self) -> GroupBits:
        """See `Solver`."""
        return bits_of_group(self.scales, shift=True)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights that are not finite."""
        check_weights(weights, inputs)
        solved = []
        for weight, one in zip(weights, checked(self, treatments), strict=True):
            assert one.quantize is not None  # noqa: S101  (checked: it does nothing else)
            grid = Grid(one.quantize.bits, shift=True, scale_dtype=scale_dtype_of(self.scales))
            groups = in_groups(weight, one.quantize.group)
            scale, zero = fit(groups, grid)
            height = max(CHUNK // groups.shape[1], 1)
            for start in range(0, len(groups), height):
                here = slice(start, start + height)
                zero[here] = self._moved(groups[here], scale[here], zero[here], grid)
            steps = steps_of(groups, scale, zero, grid)
            solved.append(quantized(weight, coded(weight, steps, scale, zero, one.quantize, grid), inputs))
        return solved

    def _moved(self, groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        """(groups,) the zero of least mean |w - w'| that the updates pass through."""
        if grid.bits == 4:  # as the official code starts
            zero = shift_zero(-zero.round() * scale, scale, grid.scale_dtype)
        step = scale.unsqueeze(1)
        best, least = zero, torch.full_like(zero, torch.inf)
        for _ in range(self.rounds + 1):
            codes = steps_of(groups, scale, zero, grid)
            error = groups - (codes - zero.unsqueeze(1)) * step
            off = error.abs().mean(1)
            better = off < least
            if not better.any():
                break
            best, least = torch.where(better, zero, best), torch.where(better, off, least)
            moved = (codes - (groups - self._shrunk(error)) / step).mean(1)
            zero = shift_zero(-moved * scale, scale, grid.scale_dtype)
        return best

    def _shrunk(self, error: Tensor) -> Tensor:
        """sign(x) max(|x| - |x|^(p - 1) / beta, 0)."""
        size = error.abs()
        return error.sign() * (size - size.pow(self.p - 1) / self.beta).clamp_min_(0)
