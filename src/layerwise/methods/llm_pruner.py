"""LLM-Pruner: heads and channels that the loss would miss least, the same share in the blocks between the first and the last
(Ma et al. 2023, arXiv:2305.11627).

Needs text: gradients of the loss. Departures: the budget is of the whole model's parameters, met to less than a unit (the code's ratio
is of groups in eligible blocks); query heads are credited to the key head they are cut with (the code's fold credits others under GQA);
products are taken in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..allocate.units import check_target, meet
from ..errors import ConfigError
from ..plan import Plan
from ..scores.units import FORMS, unit_taylor
from ..structure import Structure
from ..tasks.batches import Batches
from .base import needed
from .widths import Widths, check_share, lowest_go, widths_plan


@dataclass(frozen=True)
class LLMPruner:
    """Defaults: param_first, first and last blocks whole as in the scripts for 32 blocks (the first 4, the last 2)."""

    name: ClassVar[str] = "llm-pruner"
    summary: ClassVar[str] = (
        "heads and channels of least first-order Taylor score, the same share in all blocks but the first and last"
    )
    needs_data: ClassVar[bool] = True

    parameters: float = 0.8  # share of the model's parameters that is kept, or their number
    form: str = "first"  # first, vectorize, second, mixed
    first_whole: float = 0.125  # share of the blocks at the start that stay whole
    last_whole: float = 0.0625
    reference: bool = False  # credit query heads as the code does
    min_heads: int = 1
    min_channels: int = 1
    multiple_of: int = 1
    budget: str = "parameters"  # what the share is of: parameters, bytes, macs (a token), latency (here)
    rows: int = 1  # of latency: tokens in a forward pass

    def __post_init__(self) -> None:
        check_share("LLMPruner", self.parameters)
        if self.form not in FORMS:
            raise ConfigError(f'LLMPruner.form="{self.form}": give {", ".join(FORMS)}.')
        if not (0 <= self.first_whole < 1 and 0 <= self.last_whole < 1 and self.first_whole + self.last_whole < 1):
            raise ConfigError(
                "LLMPruner: first_whole and last_whole are shares of the blocks that leave some between them."
            )

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises BudgetError where blocks between the protected ones cannot give so much."""
        widths = Widths(
            "LLMPruner", model, structure, self.parameters,
            min_heads=self.min_heads, min_channels=self.min_channels, multiple_of=self.multiple_of, budget=self.budget, rows=self.rows,
        )  # fmt: skip
        batches = needed("LLMPruner", data)
        widths.leave_unreached(model, batches)
        names = [block.name for block in widths.structure.blocks]
        between = {*names[round(self.first_whole * len(names)) : len(names) - round(self.last_whole * len(names))]}
        eligible = [group.name for group in widths.groups if group.block in between]
        sized, costs = {name: widths.sized[name] for name in eligible}, widths.costs
        check_target(widths.target, widths.total, sized, "LLMPruner", costs.unit, costs.words)
        scores = unit_taylor(model, batches, widths.groups, widths.structure, form=self.form, modulo=self.reference)
        counts = meet(widths.total, widths.sized, widths.target, widths.evenly(eligible))
        return widths_plan(self, widths, lowest_go(scores, counts))
