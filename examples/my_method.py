"""A method in one file: sparsity that rises evenly from the first block of a stack to the last.

    python examples/my_method.py demo 0.5

It is an example and no published method: it has a score (how early a block comes), a rule that shares the budget out
(`linear_map`), and a plan. Every method in `layerwise.methods` has these three parts.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

import layerwise as lw
from layerwise.allocate import linear_map, water_fill
from layerwise.errors import ConfigError
from layerwise.methods.assemble import found, plan_of, sizes_of
from layerwise.methods.base import check_sparsities
from layerwise.plan import Plan
from layerwise.structure import Structure, structure_of
from layerwise.tasks import Batches


@dataclass(frozen=True)
class Ramp:
    """Early blocks keep more. The fields are plain values: they are written into the plan."""

    name: ClassVar[str] = "ramp"
    summary: ClassVar[str] = "sparsity rises evenly with depth"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.5  # fraction of the prunable weights set to zero
    spread: float = 0.1  # the first block gets about `spread` less than the mean, the last about `spread` more

    def __post_init__(self) -> None:
        check_sparsities("Ramp", self.sparsity)
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"Ramp.spread={self.spread}: give a number from 0 to 1.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """One sparsity per block; the whole meets the budget to the last weight."""
        structure = found(model, structure)
        scores, sizes = earliness(structure), sizes_of(structure)
        wanted = linear_map(scores, sizes, self.sparsity, self.spread)
        filled = water_fill(wanted, sizes, self.sparsity * sum(sizes.values()))  # back into [0, 1], the mean unchanged
        return plan_of(self, model, structure, self.sparsity, filled, scores=scores)


def earliness(structure: Structure) -> dict[str, float]:
    """Layer name -> 1 in the first block of its stack, falling evenly to 0 in the last; 1 outside the blocks. High = keep."""
    scores = {layer.name: 1.0 for layer in structure.outside}
    for stack in structure.stacks:
        last = max(1, len(stack.blocks) - 1)
        scores |= {layer.name: 1 - block.index / last for block in stack.blocks for layer in block.layers}
    return {layer.name: scores[layer.name] for layer in structure.layers}  # in the order of the model


def main(model: str = "demo", sparsity: str = "0.5") -> None:
    """Plan, prune, and look."""
    network = lw.load(model)
    structure = structure_of(network)
    plan = Ramp(sparsity=float(sparsity)).plan(network, structure=structure)
    result = lw.compress(network, plan, solver=lw.solvers.Magnitude(), structure=structure)
    for block in structure.blocks:
        zeros = sum(layer.zeros for layer in result.layers if layer.layer.startswith(f"{block.name}."))
        print(f"{block.name}: {zeros / sum(layer.size for layer in block.layers):.1%} zeros")
    print(f"{result.zeros} zeros in all, {result.sparsity:.4%} of the pruned layers")


if __name__ == "__main__":
    main(*sys.argv[1:])
