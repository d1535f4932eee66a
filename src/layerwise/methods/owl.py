"""OWL: one sparsity per block, lower where outlier scores are common (Yin et al. 2024, arXiv:2310.05175).

Needs input norms of the dense model; no gradients, no labels. Departures from the official code:
D1 blocks that are all alike get the same sparsity (it divides by zero). D2 the mean is weighted by size, so that blocks of unequal size
meet the budget. D3 sparsities beyond the bounds are brought back by moving all others alike (it sets those <= 0 to 0.01 and
misses the budget). D4 layers outside the blocks, which it never prunes, get the target where they are asked for. D5 its form for
n:m, another n for each block, is left out: the rounding of n misses the budget.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..allocate import check_feasible, linear_map, water_fill
from ..errors import ConfigError, DataError, ModelError
from ..plan import Plan
from ..scores import outlier_ratio
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found, plan_of, sizes_of
from .base import check_sparsities


@dataclass(frozen=True)
class OWL:
    """Defaults: the official LLaMA scripts at 70 %."""

    name: ClassVar[str] = "owl"
    summary: ClassVar[str] = "one sparsity per block, lower where outlier Wanda scores are common"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.7  # S: fraction of the prunable weights set to zero
    outlier_factor: float = 5.0  # M: an outlier exceeds M times the mean score of its block
    spread: float = 0.08  # lambda: the block sparsities span 2 * lambda
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("OWL", self.sparsity, self.min_sparsity, self.max_sparsity)
        if not self.outlier_factor > 1:
            raise ConfigError(f"OWL.outlier_factor={self.outlier_factor:g}: give a multiple of the mean, > 1.")
        if not 0 <= self.spread <= 0.5:
            raise ConfigError(f"OWL.spread={self.spread:g}: give half the width of the sparsities, 0 to 0.5.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """One sparsity per block, the same for all its layers up to whole weights. Raises what `outlier_ratio` raises, too."""
        structure = found(model, structure)
        sizes = {block.name: sum(layer.size for layer in block.layers) for block in structure.blocks if block.layers}
        if not sizes:
            raise ModelError(
                f"OWL shares sparsity out over blocks, and {type(model).__name__} has none with layers up for compression."
                " Use erk or uniform, which need no blocks."
            )
        if data is None or not len(data):
            raise DataError("OWL measures the inputs of every block and needs calibration data (--data).")
        low, high = self.min_sparsity, self.max_sparsity
        check_feasible(sizes_of(structure), self.sparsity, low, high)  # before the work
        ratios = outlier_ratio(model, data, structure, self.outlier_factor)
        mapped = linear_map(ratios, sizes, self.sparsity, self.spread)
        by_block = water_fill(mapped, sizes, self.sparsity * sum(sizes.values()), low, high)
        sparsities = {layer.name: by_block.get(layer.block or "", self.sparsity) for layer in structure}
        return plan_of(self, model, structure, self.sparsity, sparsities, low, high, scores=ratios)
