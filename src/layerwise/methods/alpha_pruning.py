"""AlphaPruning: one sparsity per block, lower where spectra of its weights have heavy tails (Lu et al. 2024, arXiv:2410.10912).

Weights alone: no data. The spectrum is of the whole matrix, so that the shape of a layer moves its alpha; `farms` takes windows.
Departures from the official code: D1 no sparsity above max_sparsity, the other blocks take the rest (it lets them exceed 1). D2 and D3 as
D2 and D4 of `farms`. D4 zero eigenvalues are left out (it takes 1e-100 for their value).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..plan import Plan
from ..scores import Fit, Look
from ..structure import Structure
from ..tasks.batches import Batches
from .heavy_tails import Excess, Per, check_settings, plan_by_tails


@dataclass(frozen=True)
class AlphaPruning:
    """Defaults: the official command's. For image models: per="layer", fit="mid", spread=0.2."""

    name: ClassVar[str] = "alpha-pruning"
    summary: ClassVar[str] = "one sparsity per block, lower where its weights have heavy-tailed spectra"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.7  # S: fraction of the prunable weights set to zero
    spread: float = 0.3  # eps: sparsities are the target times 1 ± spread, before the budget is met
    fit: Fit = "peak"  # where the tail begins: peak, peak-reference (with the official bound), mid, full
    per: Per = "block"  # what gets a sparsity of its own: block or layer
    excess: Excess = "fill"  # above the cap: fill (the others take it) or clamp (the budget is missed)
    min_sparsity: float = 0.0
    max_sparsity: float = 0.998

    def __post_init__(self) -> None:
        check_settings(self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`; data is not looked at. Raises ScoreError naming a layer whose weight is not finite."""
        return plan_by_tails(self, model, structure, Look(None, self.fit))
