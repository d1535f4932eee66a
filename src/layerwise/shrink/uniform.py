"""One width for all blocks, from a plan that gives each its own: for engines that take no other.

Never more parameters than the plan keeps, on both sides with the biases that it puts in the place of means. Heads are rounded down first,
since they come one by one; what that frees goes to the channels, in steps of `multiple_of`. Such a plan loses what its method won by
telling blocks apart, but is saved as a stock folder.
"""

from collections.abc import Mapping, Sequence
from math import lcm

from torch import nn

from ..errors import BudgetError, ConfigError
from ..plan import Plan, Resize, Treatments
from ..scores.units import magnitudes
from ..structure import Coupling, Group, coupled_groups, numbers_of, structure_of
from ..treatments import kept_text
from .apply import kept_by
from .biases import Given, biases_to_come


def uniform_widths(model: nn.Module, plan: Plan | Mapping[str, int], *, multiple_of: int = 64) -> Plan:
    """The plan with one number of heads, and one of channels, for all blocks of a stack; its notes say what that costs.

    plan: or group -> units kept (channels; key/value heads), others whole. multiple_of: what the channels divide by. Of the units that
    the plan keeps those of the largest weights stay; where a block gets more, those of its removed units come back in that order.
    Blocks that the plan drops do not count. Raises PlanError as `apply`, ConfigError for multiple_of below 1, BudgetError where not even
    `multiple_of` channels fit.
    """
    if multiple_of < 1:
        raise ConfigError(f"uniform_widths: multiple_of={multiple_of}: give a whole number, at least 1.")
    coupling = coupled_groups(model)
    if not isinstance(plan, Plan):
        kinds = {group.name: group for group in coupling.groups}
        plan = Plan(layers={name: Treatments(resize=_resize(kinds.get(name), units)) for name, units in plan.items()})
    keep = kept_by(model, plan, coupling, multiples=False)
    dropped = {name for name, entry in plan.layers.items() if entry.drop}
    groups = [group for group in coupling.groups if group.block not in dropped]
    kept = {group.name: keep.get(group.name, range(group.units)) for group in groups}
    planned = {name: len(units) for name, units in kept.items()}
    costs, before = _counted(model, plan, coupling, groups, planned)
    widths = _widths(model, groups, costs, planned, multiple_of)
    chosen = {group.name: _chosen(model, group, kept[group.name], widths[group.name]) for group in groups}
    layers = {name: entry for name, entry in plan.layers.items() if entry.resize is None}
    for group in groups:
        if widths[group.name] < group.units:
            layers[group.name] = _entry(plan, group, chosen[group.name])
    for name, entry in plan.layers.items():  # without its cut, other treatments of the same module stay
        if entry.resize is not None and name not in layers:
            rest = entry.model_copy(update={"resize": None})
            if any(getattr(rest, field) is not None for field in type(rest).model_fields):
                layers[name] = rest
    after = _counted(model, plan, coupling, groups, widths)[1]
    note = _note(groups, kept, chosen, before - after)
    return plan.model_copy(update={"layers": layers, "notes": (*plan.notes, note)})


def _resize(group: Group | None, units: int) -> Resize:
    """Of a name that the model has not, too: `kept_by` then says so."""
    if group is not None and group.kind == "heads":
        return Resize(heads=units * group.queries, kv_heads=units)
    return Resize(channels=units)


def _counted(
    model: nn.Module, plan: Plan, coupling: Coupling, groups: Sequence[Group], counts: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Group -> parameters of a unit, and those of all groups at these counts, up to what no count changes; biases that applying such a
    plan gives are among them."""
    cut = [group for group in groups if counts[group.name] < group.units]
    given = biases_to_come(model, cut, coupling) if plan.method.get("compensate") else {}
    more = {group.name: given.get(group.name, Given(0, 0)) for group in groups}
    costs = {group.name: numbers_of(model, group) + more[group.name].unit for group in groups}
    return costs, sum(more[one.name].whole - costs[one.name] * (one.units - counts[one.name]) for one in groups)


def _widths(
    model: nn.Module, groups: Sequence[Group], costs: Mapping[str, int], kept: Mapping[str, int], multiple_of: int
) -> dict[str, int]:
    """Group -> units, the same for those that lie in one place of their blocks."""
    stacks = {block.name: stack.name for stack in structure_of(model).stacks for block in stack.blocks}
    alike: dict[tuple[str, str, str, int], list[Group]] = {}
    for group in groups:
        place = group.name.removeprefix(group.block)
        alike.setdefault((group.kind, stacks[group.block], place, group.units), []).append(group)
    found: dict[str, int] = {}
    room = 0  # parameters that rounding down has freed
    for (kind, *_), members in sorted(alike.items(), key=lambda one: one[0][0] != "heads"):  # stable: heads first
        dense, cost = members[0].units, sum(costs[group.name] for group in members)
        planned = sum(costs[group.name] * kept[group.name] for group in members)
        units = min(dense, (planned + room) // cost)
        if kind == "channels" and units < dense:
            step = lcm(multiple_of, *(group.multiple for group in members))
            if units < step:
                raise BudgetError(
                    f'uniform_widths: "{members[0].name}" and those like it keep {units} of {dense} channels each, fewer than {step}.'
                    f" Give multiple_of={max(1, units)} or less, or keep more."
                )
            units -= units % step
        room += planned - units * cost
        found |= {group.name: units for group in members}
    return found


def _chosen(model: nn.Module, group: Group, kept: Sequence[int], units: int) -> list[int]:
    """Kept ones before removed ones, in each the largest weights first (of equal ones the higher index, as `lowest_first`)."""
    if units == group.units:
        return [*range(units)]
    scores, stays = magnitudes(model, [group])[group.name].tolist(), {*kept}
    order = sorted(range(group.units), key=lambda unit: (unit in stays, scores[unit], unit))
    return sorted(order[group.units - units :])


def _entry(plan: Plan, group: Group, units: Sequence[int]) -> Treatments:
    which = kept_text(unit in {*units} for unit in range(group.units))
    sizes = (
        {"heads": len(units) * group.queries, "kv_heads": len(units)}
        if group.kind == "heads"
        else {"channels": len(units)}
    )
    resize = Resize(**sizes, kept=which)
    own = plan.layers.get(group.name)
    return own.model_copy(update={"resize": resize}) if own else Treatments(resize=resize)


def _note(
    groups: Sequence[Group], kept: Mapping[str, Sequence[int]], chosen: Mapping[str, Sequence[int]], fewer: int
) -> str:
    """What one width costs, in parameters and units."""
    gone = sum(len({*kept[name]} - {*units}) for name, units in chosen.items())
    back = sum(len({*units} - {*kept[name]}) for name, units in chosen.items())
    each = dict.fromkeys(
        f"{len(chosen[group.name])} of {group.units} {'key/value heads' if group.kind == 'heads' else group.kind}"
        for group in groups
    )
    return (
        f"One width for all blocks ({', '.join(each)}): {fewer:,} parameters fewer than with widths of each block; {gone:,} units"
        f" that were kept go, {back:,} that were removed stay."
    )
