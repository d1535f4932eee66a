"""Wanda: |weight| times the norm of its input (Sun et al. 2024, arXiv:2306.11695; github.com/locuslab/wanda).

Needs column sums of squared inputs; no gradients, no update of the kept weights. Departures from the official code:
D1 exact counts, ties keep the lower index (`reference=True` brings the official rule back). D2 the official statistic is a mean over
sequences, ours a sum over tokens: a constant factor, which changes no mask. D3 where inputs say nothing (no token, or
always zero) the official code prunes by position; here by magnitude, with a note if all are so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..passes.statistics import InputStatistics, Need
from .base import PRUNES, Solved, Treated, prunes_of
from .masking import Compare, calibrated, check_compare, check_weights, magnitude_solved, mask_all, why_blind


@dataclass(frozen=True)
class Wanda:
    """Score |W_ij| * ||X_j||. All patterns; kept weights stay bit-identical."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Need] = "squares"
    treats: ClassVar[frozenset[str]] = PRUNES
    every_pattern: ClassVar[bool] = True

    compare: Compare = "row"  # the paper's finding: row for language models; layer is no worse for image models
    reference: bool = False  # the official counts and ties

    def __post_init__(self) -> None:
        check_compare("Wanda", self.compare)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights that are not finite."""
        inputs = calibrated("Wanda", inputs, "magnitude")
        prunes = prunes_of(self, treatments)
        check_weights(weights, inputs)
        if why := why_blind(inputs):
            return [magnitude_solved(w, prune, self.compare, why) for w, prune in zip(weights, prunes, strict=True)]
        norms = inputs.squares.sqrt()
        if not self.reference:  # inputs that were always zero rank below all others, by magnitude among themselves
            norms = norms.clamp_min(norms.max() * 1e-20)
        scores = (w.abs() * norms for w in weights)
        return mask_all(weights, scores, prunes, inputs, self.compare, reference=self.reference)
