"""ShortGPT: whole blocks go, those that change least what goes through them (Men et al. 2024, arXiv:2403.03853).

Needs text, no gradients. The influence is 1 - mean cosine between a block's input and its raw output, measured once on the dense model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import BudgetError, ConfigError
from ..plan import Budget, Plan, Treatments
from ..scores import block_influence
from ..shrink import can_drop
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import facts_of, found
from .base import needed
from .widths import check_share


@dataclass(frozen=True)
class ShortGPT:
    """`blocks` drops that many; else as many as bring the model down to `parameters`."""

    name: ClassVar[str] = "shortgpt"
    summary: ClassVar[str] = "whole blocks go, those that change least what goes through them"
    needs_data: ClassVar[bool] = True

    parameters: float = 0.8  # share of the model's parameters that is kept, or their number
    blocks: int = 0  # dropped; 0: as `parameters` says

    def __post_init__(self) -> None:
        check_share("ShortGPT", self.parameters)
        if self.blocks < 0:
            raise ConfigError(f"ShortGPT.blocks={self.blocks}: give the number of blocks that are dropped, or 0.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises BudgetError where all blocks together hold too little."""
        structure = found(model, structure)
        scores = block_influence(model, needed("ShortGPT", data), structure)
        order = sorted(scores, key=lambda name: (scores[name], [*scores].index(name)))
        total = sum(parameter.numel() for parameter in model.parameters())
        target = int(total * self.parameters + 1e-6) if self.parameters <= 1 else int(self.parameters)
        gone, left = self._chosen(model, structure, order, total, target)
        held: list[str] = []  # what nothing works without
        while gone and not can_drop(model, gone):
            found_out = [name for name in gone if not can_drop(model, [name])]
            if not found_out:
                break  # `apply` says why
            held += found_out
            gone, left = self._chosen(model, structure, [name for name in order if name not in held], total, target)
        said = f"{left:,} of {total:,} parameters stay ({left / total:.2%}) without {len(gone)} of {len(order)} blocks."
        notes = [said]
        if held:
            notes.append(f"kept, since the model cannot be built without: {', '.join(held)}.")
        layers = {name: Treatments(drop=True) for name in scores if name in {*gone}}
        budget = Budget() if self.blocks else Budget(parameters=target)
        facts = facts_of(model, structure)
        return Plan(model=facts, method=self, budget=budget, layers=layers, scores=scores, notes=tuple(notes))

    def _chosen(
        self, model: nn.Module, structure: Structure, order: Sequence[str], total: int, target: int
    ) -> tuple[list[str], int]:
        """The first blocks of this order that are enough, without the last one of any stack, and the parameters that are left."""
        remain = {block.name: stack.name for stack in structure.stacks for block in stack.blocks}
        gone: list[str] = []
        left = total
        for name in order:
            if len(gone) >= self.blocks and (self.blocks or left <= target):
                return gone, left
            if [*remain.values()].count(remain[name]) > 1:
                del remain[name]
                gone.append(name)
                left -= sum(one.numel() for one in model.get_submodule(name).parameters())
        if len(gone) < self.blocks or (not self.blocks and left > target):
            raise BudgetError(
                f"ShortGPT: {left:,} of {total:,} parameters are left without the {len(gone)} of {len(order)} blocks that can go."
                " Ask for more, or cut widths, too."
            )
        return gone, left
