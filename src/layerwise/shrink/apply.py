"""What a plan says of heads, channels and blocks, carried out; a bias in the place of what was removed, where one is asked for.

The bias (An et al. 2024, arXiv:2312.11983) is the mean of what was read there times the weights that read it, added to the bias of the
layer. A layer without one gets it where the model's config can say so (`attention_bias`, `mlp_bias`: then all blocks have one, zero where
nothing was removed); where it cannot (or means other linears by it, as GLM's does), the layer is left without, and that is said.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..passes import check_whole
from ..plan import Plan
from ..scores.fluctuation import Moments, moments
from ..scores.units import magnitudes
from ..structure import Coupling, Group, coupled_groups, structure_of
from ..structure.coupled import GroupKind
from ..tasks.batches import Batch
from .cut import Keep, cut_units
from .depth import check_drops, drop_blocks
from .narrow import built, settle, stock_class

_FLAGS = {"heads": "attention_bias", "channels": "mlp_bias"}


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
        notes = _compensate(model, keep, coupling, data)
        coupling = coupled_groups(model)  # with the biases that there are now
    cut_units(model, keep, coupling)
    settle(model)
    if dropped:
        drop_blocks(model, dropped)
    after = sum(parameter.numel() for parameter in model.parameters())
    return Applied(before, after, dropped, tuple(notes))


def kept_by(model: nn.Module, plan: Plan, coupling: Coupling) -> dict[str, list[int]]:
    """Group -> units that the plan keeps. Raises PlanError with everything that does not fit, or for a plan that says it is of another
    model: this one may have been cut by it already, and its blocks count anew."""
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
        elif units % group.multiple:
            problems.append(f'plan: "{name}": {units} channels; fused experts run at multiples of {group.multiple}.')
        else:
            keep[name] = resize.chosen(group.units) or _largest(model, group, units)
    if problems:
        raise PlanError(problems)
    return keep


def _largest(model: nn.Module, group: Group, units: int) -> list[int]:
    scores = magnitudes(model, [group])[group.name]
    return sorted(scores.argsort(descending=True, stable=True)[:units].tolist())


@torch.no_grad()
def _compensate(model: nn.Module, keep: Keep, coupling: Coupling, data: Sequence[Batch]) -> list[str]:
    """Biases in the place of what will go, before it goes. Returns what could not be compensated, in a sentence."""
    groups = [coupling[name] for name in keep if len(keep[name]) < coupling[name].units]
    can = {kind for kind in sorted({group.kind for group in groups}) if _may_have(model, kind, coupling)}
    wanted = [group for group in groups if _has_bias(model, group) or group.kind in can]
    seen = moments(model, data, wanted)
    for kind in sorted({group.kind for group in wanted if not _has_bias(model, group)}):
        _give_biases(model, kind, coupling)
    for group in wanted:
        part = next(part for part in group.parts if part.side == "in")
        _add_mean(model, part.parameter, part.dim, _removed(group, keep), seen)
    left = len(groups) - len(wanted)
    return (
        [
            f"{left} of {len(groups)} layers have no bias to put means into, and their config cannot say one: left without."
        ]
        if left
        else []
    )


def _removed(group: Group, keep: Keep) -> Tensor:
    part = next(part for part in group.parts if part.side == "in")
    return part.index[sorted({*range(group.units)} - {*keep[group.name]})].flatten()


def _add_mean(model: nn.Module, reader: str, dim: int, gone: Tensor, seen: Mapping[str, Moments]) -> None:
    module = model.get_submodule(reader.rpartition(".")[0])
    weight = model.get_parameter(reader).detach().double().cpu().movedim(dim, 0)  # (inputs, outputs)
    bias: nn.Parameter = module.bias  # type: ignore[assignment]
    more = seen[reader].mean[gone] @ weight[gone].flatten(1)
    bias.add_(more.to(bias))


def _has_bias(model: nn.Module, group: Group) -> bool:
    reader = next(part.parameter for part in group.parts if part.side == "in")
    return isinstance(getattr(model.get_submodule(reader.rpartition(".")[0]), "bias", None), nn.Parameter)


def _may_have(model: nn.Module, kind: GroupKind, coupling: Coupling) -> bool:
    """Whether the model's class, told so by the config, has the biases that `_give_biases` would give, all of them and no other."""
    if getattr(getattr(model, "config", None), _FLAGS[kind], None) is not False:
        return False
    config = copy.deepcopy(model.config)
    setattr(config, _FLAGS[kind], True)
    with_them = {name for name, _ in built(stock_class(model), config).named_parameters()}
    given = {f"{name}.bias" for name in _without_bias(model, kind, coupling)}
    return with_them == {name for name, _ in model.named_parameters()} | given


def _without_bias(model: nn.Module, kind: GroupKind, coupling: Coupling) -> list[str]:
    """The linears without one of all attentions or MLPs."""
    parts = [part for group in coupling.groups if group.kind == kind for part in group.parts]
    names = dict.fromkeys(part.parameter.rpartition(".")[0] for part in parts)
    return [name for name in names if isinstance(one := model.get_submodule(name), nn.Linear) and one.bias is None]


def _give_biases(model: nn.Module, kind: GroupKind, coupling: Coupling) -> None:
    """Zeros for every linear of all attentions or MLPs, and the config says so."""
    setattr(model.config, _FLAGS[kind], True)
    for name in _without_bias(model, kind, coupling):
        module: Any = model.get_submodule(name)
        module.bias = nn.Parameter(
            torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
        )
