"""Random: layer sparsities drawn around the target. The control: what says less than this says nothing.

Needs nothing but names and sizes. Each layer draws from a stream of its own, so that one layer more changes no other draw.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..allocate import check_feasible, water_fill
from ..errors import ConfigError
from ..plan import Plan
from ..randomness import generator_for
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found, plan_of, sizes_of
from .base import check_sparsities


@dataclass(frozen=True)
class RandomRatios:
    """Sparsities uniform in target +- spread, then all moved alike until the budget is met."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "layer sparsities drawn at random around the target: the control"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.5
    spread: float = 0.08  # half the width, as in OWL, so that the two differ in where, not in how much
    seed: int = 0
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("RandomRatios", self.sparsity, self.min_sparsity, self.max_sparsity)
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"RandomRatios.spread={self.spread:g}: give half the width of the sparsities, 0 to 1.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        structure = found(model, structure)
        sizes, low, high = sizes_of(structure), self.min_sparsity, self.max_sparsity
        check_feasible(sizes, self.sparsity, low, high)
        drawn = {name: self.sparsity + self.spread * (2 * self._draw(name) - 1) for name in sizes}
        filled = water_fill(drawn, sizes, self.sparsity * sum(sizes.values()), low, high)
        return plan_of(self, model, structure, self.sparsity, filled, low, high)

    def _draw(self, name: str) -> float:
        """Uniform in [0, 1). The word in front keeps the stream apart from that of solvers that draw for the same layer."""
        return torch.rand((), generator=generator_for(self.seed, f"ratio:{name}"), dtype=torch.float64).item()
