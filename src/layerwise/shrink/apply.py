"""What a plan says of heads, channels and blocks, carried out; a bias in the place of what was removed, where one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..allocate.units import lowest_first
from ..errors import DataError, PlanError
from ..passes import check_whole
from ..plan import Plan
from ..scores.units import magnitudes
from ..structure import Coupling, Group, coupled_groups, structure_of
from ..tasks.batches import Batch
from .biases import compensate
from .cut import cut_units
from .depth import check_drops, drop_blocks
from .narrow import settle


@dataclass(frozen=True)
class Applied:
    """What became of the model. parameters: distinct ones, before and after."""

    before: int
    after: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def changes_shapes(plan: Plan) -> bool:
    """Whether the plan cuts or drops anything."""
    return any(one.resize or one.drop for one in plan.layers.values())


def apply(model: nn.Module, plan: Plan, data: Sequence[Batch] | None = None) -> Applied:
    """Cut and drop what the plan says, in place. data: calibration batches, for a plan whose method compensates by biases.

    Raises PlanError for entries that the model does not have units for, or that go with other treatments; DataError where data is
    needed; ModelError and ConfigError as `shrink` and `drop_blocks`; nothing has changed then.
    """
    check_whole(model, "cutting heads and channels")
    coupling = coupled_groups(model)
    keep = kept_by(model, plan, coupling)
    dropped = tuple(name for name, one in plan.layers.items() if one.drop)
    if dropped:
        check_drops(model, dropped)  # before anything is cut
    before = sum(parameter.numel() for parameter in model.parameters())
    notes: list[str] = []
    if plan.method.get("compensate") and keep:
        if data is None or not len(data):
            raise DataError(
                "the plan replaces what it removes by biases, and needs calibration data for them (--data)."
            )
        notes = compensate(model, keep, coupling, data)
        coupling = coupled_groups(model)  # with the biases that there are now
    cut_units(model, keep, coupling)
    settle(model)
    if dropped:
        drop_blocks(model, dropped)
    after = sum(parameter.numel() for parameter in model.parameters())
    return Applied(before, after, dropped, tuple(notes))


def kept_by(model: nn.Module, plan: Plan, coupling: Coupling, *, multiples: bool = True) -> dict[str, list[int]]:
    """Group -> units that the plan keeps. Raises PlanError with everything that does not fit, or for a plan that says it is of another
    model: this one may have been cut by it already, and its blocks count anew. multiples: whether fused experts must keep theirs."""
    structure = structure_of(model)
    names = {group.name for group in coupling.groups} | {block.name for block in structure.blocks}
    plan.check_model(structure.fingerprint, names)
    problems, keep = [], dict[str, list[int]]()
    known = {group.name: group for group in coupling.groups}
    for name, entry in plan.layers.items():
        others = [field for field in ("prune", "quantize", "factorize") if getattr(entry, field)]
        if others:
            problems.append(
                f'plan: "{name}": {others[0]} does not go with a plan that cuts heads, channels or blocks. Do that first, and this'
                " to what it saves."
            )
        if entry.resize is None:
            continue
        group = known.get(name)
        if group is None:
            reason = dict(coupling.left).get(name, "no attention or MLP that can be cut")
            problems.append(f'plan: "{name}": {reason}.')
            continue
        resize = entry.resize
        units = resize.units if resize.units is not None else (resize.heads or 0) // max(1, group.queries)
        if (resize.channels is None) != (group.kind == "heads"):
            problems.append(f'plan: "{name}" has {group.kind}: give their number.')
        elif resize.heads is not None and resize.heads != units * group.queries:
            problems.append(
                f'plan: "{name}": {resize.heads} query heads are not {group.queries} for each of {units} key heads.'
            )
        elif not 1 <= units <= group.units:
            problems.append(
                f'plan: "{name}" has {group.units} {group.kind}; 1 to {group.units} can be kept, not {units}.'
            )
        elif multiples and units % group.multiple:
            problems.append(f'plan: "{name}": {units} channels; fused experts run at multiples of {group.multiple}.')
        else:
            keep[name] = resize.chosen(group.units) or _largest(model, group, units)
    if problems:
        raise PlanError(problems)
    return keep


def _largest(model: nn.Module, group: Group, units: int) -> list[int]:
    return lowest_first(magnitudes(model, [group])[group.name].tolist(), units)
