"""Biases in the place of what a plan removes: what its readers saw there on average.

The bias (An et al. 2024, arXiv:2312.11983) is the mean of what was read there times the weights that read it, added to the bias of the
layer. A layer without one gets it where the model's config can say so (`attention_bias`, `mlp_bias`: then all blocks have one, zero where
nothing was removed); where it cannot (or means other linears by it, as GLM's does), the layer is left without, and that is said.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..scores.fluctuation import Moments, moments
from ..structure import Coupling, Group
from ..structure.coupled import GroupKind
from ..tasks.batches import Batch
from .alike import built
from .cut import Keep
from .narrow import stock_class

_FLAGS = {"heads": "attention_bias", "channels": "mlp_bias"}


@torch.no_grad()
def compensate(model: nn.Module, keep: Keep, coupling: Coupling, data: Sequence[Batch]) -> list[str]:
    """Biases in the place of what will go, before it goes. Returns what could not be compensated, in a sentence."""
    groups = [coupling[name] for name in keep if len(keep[name]) < coupling[name].units]
    given = _kinds_to_give(model, groups, coupling)
    wanted = [group for group in groups if _has_bias(model, group) or group.kind in given]
    seen = moments(model, data, wanted)
    for kind in given:
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


@dataclass(frozen=True)
class Given:
    """What biases to come add to a group that is whole, and how much of that goes with each of its units."""

    whole: int
    unit: int


def biases_to_come(
    model: nn.Module, cut: Iterable[Group], coupling: Coupling, *, in_bytes: bool = False
) -> dict[str, Given]:
    """Group -> numbers (or bytes) of the biases that `compensate` gives it when the groups of `cut` are cut; those that get none are
    not in it."""
    kinds = _kinds_to_give(model, cut, coupling)
    new = {name for kind in kinds for name in _linears_to_give(model, kind, coupling)}
    found = {}
    for group in (one for one in coupling.groups if one.kind in kinds):
        parts = [part for part in group.parts if part.parameter.removesuffix(".weight") in new]
        sizes = {
            part.parameter: model.get_parameter(part.parameter).element_size() if in_bytes else 1 for part in parts
        }
        whole = sum(size * len(model.get_parameter(name)) for name, size in sizes.items())
        unit = sum(part.index.shape[1] * sizes[part.parameter] for part in parts if part.side == "out")
        found[group.name] = Given(whole, unit)
    return found


def _kinds_to_give(model: nn.Module, cut: Iterable[Group], coupling: Coupling) -> list[GroupKind]:
    """Kinds whose linears (`_linears_to_give`) all get a bias when the groups of `cut` are."""
    kinds = sorted({group.kind for group in cut if not _has_bias(model, group)})
    return [kind for kind in kinds if _may_have(model, kind, coupling)]


def _linears_to_give(model: nn.Module, kind: GroupKind, coupling: Coupling) -> list[str]:
    """The linears without a bias of all attentions or MLPs."""
    parts = [part for group in coupling.groups if group.kind == kind for part in group.parts]
    names = dict.fromkeys(part.parameter.rpartition(".")[0] for part in parts)
    return [name for name in names if isinstance(one := model.get_submodule(name), nn.Linear) and one.bias is None]


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
    given = {f"{name}.bias" for name in _linears_to_give(model, kind, coupling)}
    return with_them == {name for name, _ in model.named_parameters()} | given


def _give_biases(model: nn.Module, kind: GroupKind, coupling: Coupling) -> None:
    """Zeros for every linear of all attentions or MLPs, and the config says so."""
    setattr(model.config, _FLAGS[kind], True)
    for name in _linears_to_give(model, kind, coupling):
        module: Any = model.get_submodule(name)
        module.bias = nn.Parameter(
            torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
        )
