"""LPViT: which blocks of weights go, in which layer, under a budget of multiply-adds, bytes or energy (Xu et al. 2024, arXiv:2407.02068).

Needs batches with what the loss is taken of (`target="outputs"`: of inputs alone). A backward pass for each sample gives what its loss
feels of every block (`scores.block_fisher`). A layer's distortion without its first blocks is the quadratic form of the empirical Fisher,
layers are taken to add up, and blocks go where a further one costs the least distortion per cost saved (`allocate.hull_counts`).
The plan names the blocks, so any solver takes out just these: magnitude zeroes them, sparsegpt lets the rest make up for them.

Departures from the official code, which `reference` brings back but for D1 and D6: D1 blocks are chosen by the score their curves are made
from (a keyword mismatch makes the code's final masks those of mean |W|). D2 per-sample gradients of the task's loss, not the outer
product of one mean gradient of the mean squared logit. D3 the quadratic form alone, without a mean of squares of another scale,
smoothing or damping. D4 slopes per cost, not the same in layers of any cost, found by one sort. D5 the added energy is that of the
blocks that stay (in the code power-hungry layers are pruned less). D6 blocks must divide a layer (cut ones have a full vote in the
code), and multiply-adds are counted for a sample, not a window. The budget is met within one block (within 2 % in the code).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..allocate import check_feasible, energy_table, hull_counts
from ..errors import BudgetError, ConfigError
from ..passes import check_whole
from ..plan import Budget, Plan, Prune
from ..scores import block_fisher, fisher_curve, fisher_order, squared_outputs
from ..structure import Structure
from ..tasks.batches import Batches
from ..tasks.losses import loss_of
from ..treatments import kept_text
from .assemble import block_of, dividing, found, named_plan
from .base import check_sparsities, needed
from .block_costs import BlockCosts, Cost, costs_of
from .block_errors import measured_curves
from .lpvit_reference import reference_plan

Target = Literal["loss", "outputs"]
Order = Literal["single", "greedy"]


@dataclass(frozen=True)
class LPViT:
    """Defaults: half of the multiply-adds go, in blocks of 16 x 16."""

    name: ClassVar[str] = "lpvit"
    summary: ClassVar[str] = (
        "blocks of weights the loss feels least, per layer and block, under a budget of MACs, bytes, weights or energy"
    )
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.5  # fraction of the cost that goes
    pattern: str = "block(16x16)"  # outputs x inputs
    cost: Cost = "macs"  # what the budget counts: macs, weights, bytes or energy
    energy: float = 0.0  # share of energy in what a block is worth beside `cost`, 0 to 1
    energy_table: str = "float16"  # or float32, int8, or a .yaml or .json file of your own
    target: Target = "loss"  # what is differentiated: the task's loss (labels), or the mean squared output (none)
    order: Order = "single"  # blocks by what each costs alone, or greedily by what it adds
    samples: int = 256  # of the data, a backward pass each
    measured: int = 0  # of them, forward passes at seven shares of every layer that set its curve right; 0: none
    indivisible: Literal["error", "dense"] = "error"  # layers that the block does not divide: refuse, or leave out
    min_sparsity: float = 0.0  # of every layer, in blocks
    max_sparsity: float = 0.95
    reference: bool = False  # the official objective and allocation; see D1 to D6

    def __post_init__(self) -> None:
        check_sparsities("LPViT", self.sparsity, self.min_sparsity, self.max_sparsity)
        block_of("LPViT", self.pattern)
        for field, words in (
            ("cost", get_args(Cost)),
            ("target", get_args(Target)),
            ("order", get_args(Order)),
            ("indivisible", ("error", "dense")),
        ):
            if getattr(self, field) not in words:
                raise ConfigError(f'LPViT.{field}="{getattr(self, field)}": give {", ".join(words)}.')
        if not 0 <= self.energy <= 1:
            raise ConfigError(f"LPViT.energy={self.energy:g}: give the share of energy in the cost, 0 to 1.")
        if self.samples < 1 or self.measured < 0:
            raise ConfigError(
                f"LPViT.samples={self.samples}, measured={self.measured}: give at least 1 sample, and 0 or more measured."
            )
        if self.reference and self.cost != "macs":
            raise ConfigError(f"LPViT.cost={self.cost}: reference counts macs alone. Leave one of them out.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """Blocks of every layer. `sparsity` is of the cost of these layers, met within one block.

        Raises ShapeError naming layers that the block does not divide, BudgetError saying what can go, ModelError for a streamed model,
        ConfigError for an energy table that cannot be read, and what `scores.block_fisher` raises.
        """
        structure, data = found(model, structure), needed("LPViT", data)
        check_whole(model, "LPViT")
        shape, table = block_of("LPViT", self.pattern), energy_table(self.energy_table)
        layers = dividing(structure, Prune(sparsity=0.0, pattern=self.pattern), self.indivisible)
        if self.cost == "weights":  # before the work
            check_feasible({one.name: one.size for one in layers}, self.sparsity, self.min_sparsity, self.max_sparsity)
        costs = costs_of(model, data[0], layers, structure, shape, table)
        if self.reference:
            return reference_plan(self, model, data, structure, layers, costs)
        loss = squared_outputs if self.target == "outputs" else loss_of
        shapes = {layer.name: shape for layer in layers}
        z = block_fisher(model, data, structure, shapes, samples=self.samples, loss=loss)
        if self.sparsity and not any(of.any() for of in z.values()):
            return self._blind(model, structure, costs)
        orders = {name: fisher_order(of, self.order == "greedy") for name, of in z.items()}
        curves = {name: fisher_curve(of, orders[name]).tolist() for name, of in z.items()}
        if self.measured:
            curves = measured_curves(model, data, layers, orders, curves, shape, self.measured)
        counts = self._counts(curves, costs)
        prunes = {name: prune_of(self.pattern, order, counts[name]) for name, order in orders.items()}
        scores = {name: float(of.double().square().mean()) / 2 for name, of in z.items()}
        return self._planned(model, structure, costs, prunes, scores, unfelt(z))

    def _counts(self, curves: Mapping[str, Sequence[float]], costs: BlockCosts) -> dict[str, int]:
        """Blocks that go, by layer."""
        low, high = limits(costs.blocks, self.min_sparsity, self.max_sparsity)
        wanted, total, each = costs.to_save(self.cost, self.sparsity), costs.total(self.cost), costs.each(self.cost)
        room = math.fsum(each[name] * most for name, most in high.items())
        if wanted > room * (1 + 1e-9):
            moved = ", and inputs and outputs are moved all the same" if self.cost == "energy" else ""
            raise BudgetError(
                f"{room / total:.4g} of the {self.cost} can go (max_sparsity={self.max_sparsity:g}{moved}), target {self.sparsity:g}."
                " Raise max_sparsity, or lower the sparsity."
            )
        return hull_counts(curves, each, wanted, worth=costs.mixed(self.cost, self.energy), low=low, high=high)

    def _blind(self, model: nn.Module, structure: Structure, costs: BlockCosts) -> Plan:
        """Statistics that say nothing: the same share of blocks everywhere, which ones being the solver's business."""
        each = costs.mixed(self.cost, self.energy)
        curves = {name: [each[name] * i * i / count for i in range(count + 1)] for name, count in costs.blocks.items()}
        counts = self._counts(curves, costs)
        prunes = {
            name: Prune(sparsity=count / costs.blocks[name], pattern=self.pattern) for name, count in counts.items()
        }
        note = "no sample's loss depends on any block, which says nothing: as uniform as whole blocks allow, chosen by the solver."
        return self._planned(model, structure, costs, prunes, {}, [note])

    def _planned(
        self,
        model: nn.Module,
        structure: Structure,
        costs: BlockCosts,
        prunes: Mapping[str, Prune],
        scores: Mapping[str, float],
        notes: Sequence[str],
    ) -> Plan:
        kept = {name: costs.blocks[name] - round(one.sparsity * costs.blocks[name]) for name, one in prunes.items()}
        left = len(structure.layers) - len(prunes)
        dense = [f"{left} layers that {self.pattern} does not divide stay dense and are not counted."] if left else []
        allowed = (1 - self.sparsity) * costs.total(self.cost)
        budget = {
            "macs": Budget(flops=2 * allowed),
            "bytes": Budget(bytes=allowed),
            "weights": Budget(sparsity=self.sparsity),
            "energy": Budget(),
        }[self.cost]
        return named_plan(self, model, structure, budget, prunes, scores, [*notes, *dense, costs.sentence(kept)])


def prune_of(pattern: str, order: Tensor, count: int) -> Prune:
    """The treatment that takes out the first `count` blocks of an order."""
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[:count]] = False
    return Prune(sparsity=count / len(order), pattern=pattern, kept=kept_text(keep.tolist()))


def limits(blocks: Mapping[str, int], low: float, high: float) -> tuple[dict[str, int], dict[str, int]]:
    """(fewest, most) blocks that may go, by layer; the cap counts where both cannot be had."""
    most = {name: math.floor(Fraction(repr(float(high))) * count) for name, count in blocks.items()}
    least = {name: math.ceil(Fraction(repr(float(low))) * count) for name, count in blocks.items()}
    return {name: min(least[name], most[name]) for name in blocks}, most


def unfelt(z: Mapping[str, Tensor]) -> list[str]:
    """A note on layers that the loss does not depend on."""
    names = [name for name, of in z.items() if not of.any()]
    if not names:
        return []
    return [f"{len(names)} of {len(z)} layers change no sample's loss, such as {names[0]}: their blocks go first."]
