"""Weights of all layers ranked together: the exact mask that a score of weights asks for, and the plan that counts it."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

from torch import Tensor, nn

from ..allocate import check_feasible, sparsities_of, uniform
from ..errors import ScoreError
from ..plan import Plan, Prune
from ..scores import layer_means
from ..solvers.pooled import keep_lowest_out_of_all
from ..structure import Structure
from .assemble import plan_of, plan_with, sizes_of
from .base import Method


def keep_highest(
    scores: Mapping[str, Tensor], sparsity: float, low: float = 0.0, high: float = 1.0, *, owner: str = "the score"
) -> dict[str, Tensor]:
    """Layer name -> bool mask in the shape of its scores: the highest over all layers together, all but round(sparsity * total) kept.

    low, high: bounds on the sparsity of each layer; within them a layer loses its own lowest. Ties keep the layer that comes first,
    in it the lower index. Beside scores and masks it takes some 10 MB. Raises BudgetError, saying what would be feasible, and ScoreError
    where all scores are equal: then they rank nothing, and by position whole layers would go.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    check_feasible(sizes, sparsity, low, high)
    pruned, total = round(sparsity * sum(sizes.values())), sum(sizes.values())
    if 0 < pruned < total and (value := common(scores)) is not None:
        raise ScoreError(
            f"{owner} is {value:g} for every weight, so it ranks none above another. Use other data, or the method uniform."
        )
    # a bound means the decimal that was written: 0.29 of 100 is 29, though the float product is below it
    most = [math.floor(Fraction(repr(high)) * size) for size in sizes.values()]
    least = [math.ceil(Fraction(repr(low)) * size) for size in sizes.values()]
    least = [min(pair) for pair in zip(least, most, strict=True)]  # the cap counts where both cannot be had
    return dict(zip(scores, keep_lowest_out_of_all(list(scores.values()), pruned, least, most), strict=True))


class Ranking(Method, Protocol):
    """A method whose budget and bounds are those of one ranking of all weights."""

    @property
    def sparsity(self) -> float: ...
    @property
    def min_sparsity(self) -> float: ...
    @property
    def max_sparsity(self) -> float: ...


def plan_by_rank(
    method: Ranking,
    model: nn.Module,
    structure: Structure,
    scores: Mapping[str, Tensor],
    *,
    owner: str,
    rank: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Plan:
    """The plan in which each layer loses as many weights as its mask takes, that of `rank` (None: `keep_highest`); beside it the mean
    score of each layer. Scores that are all equal rank nothing: uniform, with a note; another note where layers are emptied."""
    sparsity, low, high = method.sparsity, method.min_sparsity, method.max_sparsity
    sizes, means = sizes_of(structure), layer_means(scores)
    if sparsity and (value := common(scores)) is not None:
        check_feasible(sizes, sparsity, low, high)
        note = f"{owner} is {value:g} for every weight, so it ranks none above another: uniform"
        return plan_of(method, model, structure, sparsity, uniform(sizes, sparsity), low, high, means, (note,))
    keep = keep_highest(scores, sparsity, low, high, owner=owner) if rank is None else rank()
    zeros = {name: sizes[name] - int(keep[name].sum()) for name in sizes}
    prunes = {name: Prune(sparsity=exact) for name, exact in sparsities_of(zeros, sizes).items()}
    notes = _emptied([name for name, gone in zeros.items() if gone == sizes[name]], len(sizes))
    return plan_with(method, model, structure, sparsity, prunes, means, notes)


def common(scores: Mapping[str, Tensor]) -> float | None:
    """The one value that all scores have, or None."""
    ends = {float(end) for score in scores.values() for end in score.aminmax()}
    return ends.pop() if len(ends) == 1 else None


def _emptied(names: Sequence[str], layers: int) -> tuple[str, ...]:
    """What global ranking may do, and hardly anybody wants."""
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (f"{len(names)} of {layers} layers lose every weight: {shown}. A max_sparsity below 1 keeps some",)
