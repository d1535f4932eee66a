"""Scores of units (heads, channels): what they would be missed by, summed over everything that goes with them; high = keep.

`sums` adds entries of a parameter by the unit that they belong to. What an entry is worth: the square of the weight, or first-order Taylor,
|w g| (LLM-Pruner's param_first), |sum of w g over a row| (vectorize), second order |w^2 f|, or both (Ma et al. 2023, arXiv:2305.11627,
as corrected: all in float32, since w g of half precision is mostly zero, and query heads go to the key head that they read).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ScoreError
from ..structure import Group, Part, Structure
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from .gradients import gradients
from .watching import part, tell

FORMS = ("first", "vectorize", "second", "mixed")
Worth = Callable[[str, Tensor], Tensor]
"""(parameter name, its values in float32) -> what each entry is worth, in the same shape."""


def sums(values: Tensor, part: Part) -> Tensor:
    """(units,): the entries of each unit summed. values: in the parameter's shape."""
    rest = [axis for axis in range(values.ndim) if axis != part.dim]
    along = values.sum(rest) if rest else values
    return along[part.index.to(along.device)].sum(1)


def row_sums(values: Tensor, part: Part) -> Tensor:
    """The same with |sum| over each row or column before they are added: "vectorize"."""
    rest = [axis for axis in range(values.ndim) if axis != part.dim]
    along = (values.sum(rest) if rest else values).abs()
    return along[part.index.to(along.device)].sum(1)


def unit_scores(
    model: nn.Module, groups: Sequence[Group], worth: Worth, *, vectorize: bool = False, modulo: bool = False
) -> dict[str, Tensor]:
    """Group -> score of each unit, float32 on the CPU.

    modulo: query head a is credited to key head a mod K, as LLM-Pruner's and Adapt-Pruner's codes do where they fold queries onto keys
    (it is cut with head floor(a / r)): right where every query head has its own. Raises ScoreError for a score that is not finite.
    """
    found = {}
    for group in groups:
        total = torch.zeros(group.units)
        for one in (member for member in group.parts if member.scored):
            index = _folded(one, group) if modulo else one
            values = worth(one.parameter, model.get_parameter(one.parameter).detach().float())
            total += (row_sums if vectorize else sums)(values, index).cpu()
        if not total.isfinite().all():
            raise ScoreError(
                f'"{group.name}": the score of a unit is not finite. Load the model in float32 or bfloat16.'
            )
        found[group.name] = total
    return found


def magnitudes(model: nn.Module, groups: Sequence[Group], power: int = 2) -> dict[str, Tensor]:
    """Group -> sum of |w|^power over all that goes with each unit."""
    return unit_scores(model, groups, lambda _, values: values.abs() ** power)


def unit_taylor(
    model: nn.Module,
    data: Sequence[Batch],
    groups: Sequence[Group],
    structure: Structure,
    *,
    form: str = "first",
    modulo: bool = False,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Group -> first-order Taylor score of each unit (`FORMS`), gradients summed over the batches.

    structure: the layers whose parameters are scored. second, mixed: f is the mean over batches of g^2, so batches of one sample give what
    the paper means; they take a pass each and a copy of the weights more. Errors as in `gradients`.
    """
    parameters = {layer.name: layer.parameter for layer in structure}
    if form in ("second", "mixed"):
        g, f = _squares(model, data, structure, loss)
        firsts, seconds = ({parameters[name]: one for name, one in found.items()} for found in (g, f))
        if form == "second":
            return unit_scores(model, groups, lambda n, w: (w.square() * seconds[n]).abs(), modulo=modulo)
        return unit_scores(
            model, groups, lambda n, w: (w * firsts[n] - 0.5 * w.square() * seconds[n]).abs(), modulo=modulo
        )
    found = {parameters[name]: one for name, one in gradients(model, data, structure, loss=loss).items()}
    if form == "vectorize":
        return unit_scores(model, groups, lambda n, w: w * found[n], vectorize=True, modulo=modulo)
    return unit_scores(model, groups, lambda n, w: (w * found[n]).abs(), modulo=modulo)


def _squares(
    model: nn.Module, data: Sequence[Batch], structure: Structure, loss: Loss
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The mean gradient, and the mean of its square over batches."""
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for index, batch in enumerate(data):
        with part(index, len(data)):
            found = gradients(model, [batch], structure, loss=loss)
        for name, one in found.items():
            mean[name] = mean[name].add_(one, alpha=1 / len(data)) if name in mean else one / len(data)
            squared = one.square_().div_(len(data))
            square[name] = square[name].add_(squared) if name in square else squared
    tell(len(data), len(data))
    return mean, square


def _folded(one: Part, group: Group) -> Part:
    """Query heads of a part in the order of the codes' fold: head a to unit a mod units."""
    if group.kind != "heads" or one.index.shape[1] != group.queries * group.head_dim or group.queries == 1:
        return one
    heads = one.index.reshape(group.heads, group.head_dim)  # in the order of floor(a / r)
    folded = heads.reshape(group.queries, group.units, group.head_dim).transpose(0, 1)
    return Part(one.parameter, one.dim, folded.reshape(group.units, -1), one.side, one.scored)
