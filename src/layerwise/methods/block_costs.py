"""What the blocks of each layer cost to keep: multiply-adds, weights, bytes, energy; for methods that budget one of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..allocate import EnergyTable
from ..passes import uses_of
from ..structure import Layer, Structure
from ..tasks.batches import Batch

Cost = Literal["macs", "weights", "bytes", "energy"]


@dataclass(frozen=True)
class BlockCosts:
    """By layer name. blocks: how many. of_block: what one costs, for each kind of cost (macs and energy, in pJ, of one sample).

    fixed: picojoules of a layer whatever is pruned (its inputs and outputs).
    """

    blocks: Mapping[str, int]
    of_block: Mapping[Cost, Mapping[str, float]]
    fixed: Mapping[str, float]

    def each(self, cost: Cost) -> Mapping[str, float]:
        return self.of_block[cost]

    def total(self, cost: Cost) -> float:
        """Of all layers whole."""
        return self.of_kept(cost, self.blocks)

    def of_kept(self, cost: Cost, kept: Mapping[str, int]) -> float:
        """With so many blocks kept in each layer."""
        fixed = math.fsum(self.fixed.values()) if cost == "energy" else 0.0
        return fixed + math.fsum(kept[name] * each for name, each in self.of_block[cost].items())

    def to_save(self, cost: Cost, sparsity: float) -> float:
        """What must go for this fraction of the total; of weights a whole number."""
        saved = sparsity * self.total(cost)
        return float(round(saved)) if cost == "weights" else saved

    def mixed(self, cost: Cost, energy: float) -> dict[str, float]:
        """What a block is worth: shares of the total cost, and of the total energy by `energy`, 0 to 1."""
        own, power = self.each(cost), self.each("energy")
        total, joules = self.total(cost) or 1.0, self.total("energy") or 1.0
        return {name: (1 - energy) * own[name] / total + energy * power[name] / joules for name in own}

    def sentence(self, kept: Mapping[str, int]) -> str:
        """For people: what is kept of each."""
        macs, size, energy = ((self.of_kept(cost, kept), self.total(cost)) for cost in ("macs", "bytes", "energy"))
        return (
            f"kept: {macs[0] / 1e6:.4g} of {macs[1] / 1e6:.4g} million multiply-adds a sample"
            f" ({_share(macs)}), {size[0] / 1e6:.4g} of {size[1] / 1e6:.4g} MB of blocks ({_share(size)}), {energy[0] / 1e6:.4g} of"
            f" {energy[1] / 1e6:.4g} uJ a sample by the energy model ({_share(energy)}); these layers alone, and no engine is promised."
        )


def costs_of(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[Layer],
    structure: Structure,
    shape: tuple[int, int],
    table: EnergyTable,
) -> BlockCosts:
    """Of these layers in blocks of this shape, by one forward pass. Raises what `passes.uses_of` raises."""
    height, width = shape
    uses = uses_of(model, structure, batch)
    return BlockCosts(
        blocks={layer.name: layer.size // (height * width) for layer in layers},
        of_block={
            "macs": {layer.name: uses[layer.name] * height * width for layer in layers},
            "weights": {layer.name: float(height * width) for layer in layers},
            "bytes": {layer.name: table.block_bytes(height, width) for layer in layers},
            "energy": {layer.name: table.of_block(height, width, uses[layer.name]) for layer in layers},
        },
        fixed={
            layer.name: layer.matrices * table.of_activations(layer.rows, layer.columns, uses[layer.name])
            for layer in layers
        },
    )


def _share(pair: tuple[float, float]) -> str:
    return f"{pair[0] / pair[1]:.1%}" if pair[1] else "none"
