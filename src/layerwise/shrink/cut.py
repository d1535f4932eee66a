"""Cutting units out of a model: rows, columns and biases go, sizes that modules remember follow, and the model runs at once."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..structure import Coupling, Group, coupled_groups

Keep = Mapping[str, Sequence[int]]
"""Group -> the units that stay."""

# what attentions and MLPs remember of their sizes, where they do: forward passes of some read it
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEADS_WIDE = ("all_head_size", "split_size")
_CHANNELS = ("intermediate_size", "intermediate_dim", "expert_dim", "mlp_dim")
_BY_CONFIG = ("Phi3Attention",)  # reads the number of its query heads in the model's config


def shrink(model: nn.Module, keep: Keep, coupling: Coupling | None = None) -> None:
    """Keep these units of these groups, in place; groups that are not named stay whole. Parameters are new ones: make optimisers after.

    Afterwards a model of transformers says its sizes (`narrow.settle`): in its config where all blocks are alike and the stock class
    can be built so; else its class becomes one of the same name that saves and loads them.
    Equal to setting all that reads a removed unit to zero, up to rounding. A unit must be left in every group.
    Raises ModelError for a group that the model has not, ConfigError for units that it has not, given twice, or none; nothing has
    changed then. Shared parameters are cut once.
    """
    cut_units(model, keep, coupling)
    from .narrow import settle

    settle(model)


def cut_units(model: nn.Module, keep: Keep, coupling: Coupling | None = None) -> None:
    """`shrink` without telling the config: for steps of a longer way, and models that are about to be filled."""
    coupling = coupling or coupled_groups(model)
    chosen = [(coupling[name], _checked(coupling[name], units)) for name, units in keep.items()]
    cuts: dict[tuple[str, int], Tensor] = {}
    for group, units in chosen:
        for part in group.parts:
            cuts[part.parameter, part.dim] = _entries(model, part.parameter, part.dim, part.index, units, cuts)
    for (name, dim), entries in cuts.items():
        _cut(model, name, dim, entries)
    for group, units in chosen:
        _remember(model.get_submodule(group.name), group, len(units))


def _checked(group: Group, units: Sequence[int]) -> list[int]:
    found = sorted(int(unit) for unit in units)
    if not found:
        what = "head" if group.kind == "heads" else "channel"
        raise ConfigError(
            f'"{group.name}": none of its {group.units} {group.kind} would be left. Keep at least one {what}, or drop the block.'
        )
    if len({*found}) < len(found) or found[0] < 0 or found[-1] >= group.units:
        raise ConfigError(
            f'"{group.name}" has {group.kind} 0 to {group.units - 1}, each once; {found[:8]} were to be kept.'
        )
    if len(found) % group.multiple:
        raise ConfigError(
            f'"{group.name}": {len(found)} of its {group.units} channels were to be kept; fused experts run at multiples of'
            f" {group.multiple}."
        )
    return found


def _entries(
    model: nn.Module, name: str, dim: int, index: Tensor, units: Sequence[int], cuts: Mapping[tuple[str, int], Tensor]
) -> Tensor:
    """The entries along `dim` that stay: all but those of removed units."""
    size = model.get_parameter(name).shape[dim]
    stays = torch.ones(size, dtype=torch.bool, device="cpu")
    if (name, dim) in cuts:  # another group cut it, too
        stays = torch.zeros(size, dtype=torch.bool, device="cpu").index_fill_(0, cuts[name, dim], True)
    gone = torch.ones(len(index), dtype=torch.bool, device="cpu")
    gone[list(units)] = False
    stays[index[gone].flatten()] = False
    return stays.nonzero().flatten()


def _cut(model: nn.Module, name: str, dim: int, entries: Tensor) -> None:
    """A new parameter with these entries, wherever the old one was; its module knows its size."""
    path, _, own = name.rpartition(".")
    owner, old = model.get_submodule(path), model.get_parameter(name)
    if len(entries) == old.shape[dim]:
        return
    new = nn.Parameter(
        old.detach().index_select(dim, entries.to(old.device)).contiguous(), requires_grad=old.requires_grad
    )
    owner._parameters[own] = new
    if own != "weight":
        return
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = new.shape
    elif hasattr(owner, "nf"):  # transformers' Conv1D
        owner.nx, owner.nf = new.shape  # type: ignore[assignment]


def _remember(module: nn.Module, group: Group, units: int) -> None:
    """Sizes that the module keeps as numbers of its own."""
    if group.kind == "channels":
        sizes = dict.fromkeys(_CHANNELS, units)
    else:
        heads = units * group.queries
        sizes = dict.fromkeys(_QUERY_HEADS, heads) | dict.fromkeys(_KV_HEADS, units)
        sizes |= dict.fromkeys(_HEADS_WIDE, heads * group.head_dim)
        if type(module).__name__ in _BY_CONFIG:
            config = copy.copy(module.config)
            config.num_attention_heads = heads  # type: ignore[union-attr]
            module.config = config
    for name, size in sizes.items():
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, size)


def zero_out(model: nn.Module, keep: Keep, coupling: Coupling | None = None) -> None:
    """The same in zeros: everything that reads a removed unit. For who wants to see what removal does before it is done."""
    coupling = coupling or coupled_groups(model)
    for name, units in keep.items():
        group = coupling[name]
        gone = sorted({*range(group.units)} - {*_checked(group, units)})
        for part in group.parts:
            if part.side == "in":
                parameter = model.get_parameter(part.parameter)
                entries = part.index[gone].flatten().to(parameter.device)
                parameter.data.index_fill_(part.dim, entries, 0)
