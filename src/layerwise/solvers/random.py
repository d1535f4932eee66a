"""Random: the control that every other solver must beat. Draws on the CPU from the layer's own stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..passes.statistics import InputStatistics, Need
from .base import PRUNES, Solved, Treated, prunes_of
from .masking import check_weights, mask_all


@dataclass(frozen=True)
class Random:
    """A uniformly random mask of the exact count. All patterns; kept weights stay bit-identical."""

    name: ClassVar[str] = "random"
    needs: ClassVar[Need] = "none"
    treats: ClassVar[frozenset[str]] = PRUNES
    every_pattern: ClassVar[bool] = True

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
        scores = (torch.rand(w.shape, generator=g).to(w.device) for w, g in zip(weights, generators, strict=True))
        return mask_all(weights, scores, prunes, inputs)
