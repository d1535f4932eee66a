"""NoWag: weights normalised by the norms of their columns and rows, and NoWag-P, its pruning (Liu et al. 2025, arXiv:2504.14569).

Needs column sums of squared inputs; no gradients, no update of the kept weights. W = diag(r) W' diag(c): columns first, then rows, so that
rows of W' have unit norm. The score is W'_ij^2 times the power of input j: within a row that is Wanda's with W_ij over its column's norm.
Departures from the official code: D1 no 1e-5 added to norms, a norm of zero divides by one: nothing depends on the scale of the
weight (`reference=True` adds it). D2 inputs that are always zero get a millionth of the mean power, not the mean: a channel that never
fires is not worth a weight (`reference=True`: the mean). D3 ties keep the lower index, counts are exact. D4 inputs that are not
finite are an error that names the layer, not the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..passes.statistics import InputStatistics, Need
from .base import PRUNES, Solved, Treated, prunes_of
from .masking import Compare, calibrated, check_compare, check_weights, keep_by_score, masked, why_blind

EPSILON = 1e-5  # of the official code
FLOOR = 1e-6  # share of the mean power that an input counts with at least


@dataclass(frozen=True)
class NoWag:
    """Score W'_ij^2 E[x_j^2] of the normalised weight. All patterns; kept weights stay bit-identical."""

    name: ClassVar[str] = "nowag"
    needs: ClassVar[Need] = "squares"
    treats: ClassVar[frozenset[str]] = PRUNES
    every_pattern: ClassVar[bool] = True

    compare: Compare = "layer"  # unstructured: normalised weights compete over the whole matrix, or within each row
    reference: bool = False  # the official constants

    def __post_init__(self) -> None:
        check_compare("NoWag", self.compare)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights or inputs that are not finite."""
        inputs = calibrated("NoWag", inputs, "magnitude")
        prunes = prunes_of(self, treatments)
        check_weights(weights, inputs)
        power, note = power_of(inputs, reference=self.reference)
        solved = []
        for weight, prune in zip(weights, prunes, strict=True):
            scores = normalise(weight, EPSILON if self.reference else 0.0).weight.abs() * power.sqrt()
            solved.append(masked(weight, keep_by_score(scores, prune, self.compare), inputs, note))
        return solved


@dataclass(frozen=True)
class Normalised:
    """weight: (rows, columns), rows: (rows,), columns: (columns,), such that diag(rows) weight diag(columns) is what was given."""

    weight: Tensor
    rows: Tensor
    columns: Tensor


def normalise(weight: Tensor, epsilon: float = 0.0) -> Normalised:
    """Divide by the norms of the columns, then of the rows. epsilon: added to each norm; a norm of zero becomes one."""

    def divisor(norm: Tensor) -> Tensor:
        return torch.where(norm > 0, norm, 1.0) if epsilon == 0 else norm + epsilon

    columns = divisor(torch.linalg.vector_norm(weight, dim=0))
    weight = weight / columns
    rows = divisor(torch.linalg.vector_norm(weight, dim=1))
    return Normalised(weight / rows.unsqueeze(1), rows, columns)


def power_of(inputs: InputStatistics, *, reference: bool = False) -> tuple[Tensor, str | None]:
    """(columns,) > 0: mean square of each input, scaled to a mean of one; and why all count alike, where calibration says nothing."""
    squares = inputs.squares
    if why := why_blind(inputs):
        return torch.ones_like(squares), f"{why}: all inputs count alike"
    power = squares / squares.max()  # sums near the largest float do not overflow
    power = power / power.mean()
    dead = power <= 0
    return torch.where(dead, power[~dead].mean(), power) if reference else power.clamp_min(FLOOR), None
