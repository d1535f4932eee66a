"""Magnitude: the smallest weights go. No data, no update of the others (Han et al. 2015, arXiv:1506.02626)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..passes.statistics import InputStatistics, Need
from .base import PRUNES, Solved, Treated, prunes_of
from .masking import Compare, check_compare, check_weights, mask_all


@dataclass(frozen=True)
class Magnitude:
    """Score |W|. All patterns; kept weights stay bit-identical."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[Need] = "none"
    treats: ClassVar[frozenset[str]] = PRUNES
    every_pattern: ClassVar[bool] = True

    compare: Compare = "layer"  # weights compete over the whole matrix, or within each row (output)
    reference: bool = False  # the counts and ties of the official Wanda repository, which prunes one too many

    def __post_init__(self) -> None:
        check_compare("Magnitude", self.compare)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights that are not finite."""
        check_weights(weights, inputs)
        prunes = prunes_of(self, treatments)
        return mask_all(weights, map(torch.abs, weights), prunes, inputs, self.compare, reference=self.reference)
