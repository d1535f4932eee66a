"""From a plan's `train` entries to parameter groups: learning rates by layer, low-rank updates for the matrices in blocks."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import PlanError
from ..plan import Plan
from ..structure import Structure, structure_of
from .low_rank import LowRank

_PROJECTED = ("linear", "conv1d", "experts")  # a convolution's last two axes are no matrix


def rates_of(plan: Plan) -> dict[str, float]:
    """Layer or block -> what its learning rate is multiplied by, of the entries that say so."""
    trains = {name: entry.train for name, entry in plan.layers.items() if entry.train}
    return {name: train.rate for name, train in trains.items() if train.rate is not None}


def probabilities_of(plan: Plan) -> dict[str, float]:
    """Block -> probability of being drawn first, of the entries that say so. Raises PlanError if none does."""
    trains = {name: entry.train for name, entry in plan.layers.items() if entry.train}
    found = {name: train.probability for name, train in trains.items() if train.probability is not None}
    if not found:
        raise PlanError(
            "plan: no entry has a probability, so no block can be drawn. Add train: {probability: 0.1} to blocks, or make a plan with"
            " owlore."
        )
    return found


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    low_rank: LowRank | None = None,
    structure: Structure | None = None,
) -> list[dict[str, Any]]:
    """Groups with every trained parameter once, each with its own "lr", for any optimiser of torch; low_rank: for `LowRankAdam`.

    rates: name of a layer, a block or any other module (or a parameter) -> factor of `lr` for what is in it; the longest name counts, and
    what is in none has factor 1. Schedulers of torch and transformers multiply each group's own rate. Biases, norms and other vectors
    do not decay. low_rank: linears and experts in blocks are projected; embeddings, heads, convolutions and vectors are not.
    structure: of every weight, found anew when None. Raises PlanError for a name of `rates` that the model does not have.
    """
    structure = structure or structure_of(model, include=["*"])
    rates, used = rates or {}, set()
    inside = {id(model.get_parameter(one.parameter)) for block in structure.blocks for one in block.layers
              if one.kind in _PROJECTED}  # fmt: skip
    found: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        owner = _holder(name, rates)
        used.add(owner)
        if parameter.requires_grad:
            key = rates.get(owner, 1.0), parameter.ndim > 1, low_rank is not None and id(parameter) in inside
            found.setdefault(key, []).append(parameter)
    if unknown := [name for name in rates if name not in used and not _exists(model, name)]:
        raise PlanError(
            [f'plan: train.rate of "{name}": the model has no layer or block of this name.' for name in unknown]
        )
    groups = []
    for (rate, decays, projected), parameters in found.items():
        group = {"params": parameters, "lr": lr * rate, "weight_decay": weight_decay if decays else 0.0}
        if projected and low_rank is not None:
            group |= {"rank": low_rank.rank, "gap": low_rank.gap, "scale": low_rank.scale}
        groups.append(group)
    return groups


def _holder(name: str, rates: Mapping[str, float]) -> str:
    """The longest name of `rates` that this parameter has or is in; "" if there is none."""
    while name and name not in rates:
        name = name.rpartition(".")[0]
    return name


def _exists(model: nn.Module, name: str) -> bool:
    """Whether the name is there, though others inside it have taken all its parameters, or it is the other name of a tied one."""
    return any(
        other == name or other.startswith(f"{name}.") for other, _ in model.named_parameters(remove_duplicate=False)
    )
