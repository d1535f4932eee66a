"""What methods for width share: groups and their costs, the target, and a plan of the units that stay."""

from collections.abc import Collection, Mapping, Sequence
from math import lcm
from typing import Any

from torch import Tensor, nn

from ..allocate.units import Sized, check_target, lowest_first, parameters_of
from ..errors import BudgetError, ConfigError, ModelError
from ..passes import check_whole, reached_blocks
from ..plan import Budget, Plan, Resize, Treatments
from ..scores.unit_costs import costs_of
from ..structure import Coupling, Group, Structure, coupled_groups, structure_of
from ..tasks.batches import Batch
from ..treatments import kept_text
from .assemble import facts_of

__all__ = ["Widths", "check_share", "widths_plan"]


def check_share(owner: str, parameters: float) -> None:
    """Raise ConfigError unless it is a share of the model's parameters, or a number of them."""
    if not parameters > 0 or (parameters > 1 and parameters != int(parameters)):
        raise ConfigError(
            f"{owner}.parameters={parameters:g}: give the share of the model's parameters that is kept, 0 < parameters <= 1, or"
            " their whole number."
        )


class Widths:
    """The groups of a model as allocation sees them, and a target in parameters (distinct tensors once, embeddings and all)."""

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        structure: Structure | None,
        parameters: float,
        *,
        min_heads: int = 1,
        min_channels: int = 1,
        multiple_of: int = 1,
        budget: str = "parameters",
        rows: int = 1,
    ) -> None:
        if min(min_heads, min_channels, multiple_of) < 1:
            raise ConfigError(f"{owner}: min_heads, min_channels and multiple_of are at least 1.")
        check_share(owner, parameters)
        self.owner, self.structure = owner, structure or structure_of(model)
        self.facts = facts_of(model, self.structure)
        self.coupling: Coupling = coupled_groups(model, self.structure)
        if not self.coupling.groups:
            reasons = "; ".join(sorted({reason for _, reason in self.coupling.left})) or "it has no blocks"
            raise ModelError(f"{type(model).__name__} has no heads or channels that can be cut: {reasons}.")
        self.costs = costs_of(model, self.groups, budget, rows)
        self.total = self.costs.total
        self.target = int(self.total * parameters + 1e-6) if parameters <= 1 else int(parameters)
        self.sized = {
            group.name: Sized(
                group.units,
                self.costs.units[group.name],
                min(group.units, min_heads if group.kind == "heads" else min_channels),
                lcm(group.multiple, multiple_of) if group.kind == "channels" else 1,
            )
            for group in self.groups
        }
        self.budget = budget
        check_target(self.target, self.total, self.sized, owner, self.costs.unit, self.costs.words)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.coupling.groups

    @property
    def notes(self) -> list[str]:
        """What is left whole, and why."""
        reasons: dict[str, int] = {}
        for _, reason in self.coupling.left:
            reasons[reason] = reasons.get(reason, 0) + 1
        return [f"{count} left whole: {reason}." for reason, count in reasons.items()]

    def leave_unreached(self, model: nn.Module, data: Sequence[Batch]) -> None:
        """Keep the groups of blocks that no batch comes to whole: their scores would all be zero. See `keep_whole`."""
        check_whole(model, self.owner)
        met = reached_blocks(model, self.structure, data)
        self.keep_whole({block.name for block in self.structure.blocks} - met, "no batch comes to")

    def keep_whole(self, blocks: Collection[str], why: str) -> None:
        """Take the groups of these blocks out, which the notes then say. Raises BudgetError where the others cannot give so much,
        ModelError where there are none."""
        reasons = {
            block.name: f"{why} {sum(one.name in blocks for one in stack.blocks)} of {len(stack.blocks)} blocks of {stack.name}"
            for stack in self.structure.stacks
            for block in stack.blocks
            if block.name in blocks
        }
        whole = [(group.name, reasons[group.block]) for group in self.groups if group.block in reasons]
        if not whole:
            return
        groups = tuple(group for group in self.groups if group.block not in reasons)
        self.coupling = Coupling(groups, (*self.coupling.left, *whole))
        self.sized = {group.name: self.sized[group.name] for group in groups}
        said = "; ".join(dict.fromkeys(reason for _, reason in whole))
        if not groups:
            raise ModelError(f"{self.owner}: nothing can be cut: {said}.")
        try:
            check_target(self.target, self.total, self.sized, self.owner, self.costs.unit, self.costs.words)
        except BudgetError as error:
            raise BudgetError(f"{error} Left whole: {said}.") from error

    def evenly(self, eligible: Sequence[str]) -> Any:
        """For `allocate.units.meet`: every eligible group keeps the same share."""
        return lambda t: {name: one.units * (1 - t if name in eligible else 1.0) for name, one in self.sized.items()}


def widths_plan(
    method: Any,
    widths: Widths,
    kept: Mapping[str, Sequence[int]],
    scores: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that keeps these units; groups that stay whole are not in it."""
    layers: dict[str, Treatments] = {}
    for group in widths.groups:
        units = kept[group.name]
        if len(units) == group.units:
            continue
        stays = {*units}
        which = kept_text(unit in stays for unit in range(group.units))
        sizes = (
            {"heads": len(units) * group.queries, "kv_heads": len(units)}
            if group.kind == "heads"
            else {"channels": len(units)}
        )
        layers[group.name] = Treatments(resize=Resize(**sizes, kept=which))
    left = parameters_of(widths.total, widths.sized, {name: len(units) for name, units in kept.items()})
    words = widths.costs.words
    off = f", {words(abs(widths.target - left))} {'fewer' if left <= widths.target else 'more'} than asked for"
    short = "" if widths.budget == "latency" else off
    total = widths.costs.total  # of the model as it is; `widths.total` may count biases that cutting gives it
    said = [f"{words(left)} of {words(total)} {widths.costs.unit} stay ({left / total:.2%}){short}."]
    return Plan(
        model=widths.facts,
        method=method,
        budget=_budget(widths),
        layers=layers,
        scores=dict(scores or {}),
        notes=(*said, *widths.notes, *notes),
    )


def _budget(widths: Widths) -> Budget:
    """What a plan can say of it; a time is in its notes alone, being of one device."""
    if widths.budget == "macs":
        return Budget(flops=2 * widths.target)
    if widths.budget == "bytes":
        return Budget(bytes=widths.target)
    return Budget(parameters=widths.target) if widths.budget == "parameters" else Budget()


def lowest_go(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Group -> units that stay: the lowest scores of each go first."""
    return {name: lowest_first(one.tolist(), counts[name]) for name, one in scores.items()}
