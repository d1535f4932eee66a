"""FLAP: heads and channels that fluctuate least, compared over the whole model, their means kept as biases
(An et al. 2024, arXiv:2312.11983).

Needs text, no gradients. Departures: mean and variance are exact over all tokens (the code's running statistic aliases its mean); the
budget is of the whole model's parameters, a unit costing what it takes along (the code fixes 512/3 for a head); a score that is constant
over a layer gives zeros, not NaN; the threshold's own unit is kept; no layer loses all its heads. `reference` brings back the statistic,
the costs and the threshold: units are then fewer than asked for. Biases are the exact means all the same, added to what is there; those
that the layers do not have yet count as parameters.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from torch import Tensor, nn

from ..allocate.units import check_target, fill, parameters_of
from ..errors import ConfigError, DataError
from ..plan import Plan
from ..scores.fluctuation import KINDS, fluctuations, moments, running
from ..shrink.biases import biases_to_come
from ..structure import Group, Structure, coupled_groups
from ..tasks.batches import Batches, count_samples
from .base import needed
from .widths import Widths, check_share, lowest_go, widths_plan


@dataclass(frozen=True)
class FLAP:
    """Defaults: WIFV, adaptive over layers and modules (AL-AM)."""

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "heads and channels that fluctuate least over the whole model, their means kept as biases"
    needs_data: ClassVar[bool] = True

    parameters: float = 0.8  # share of the model's parameters that is kept, or their number
    score: str = "wifv"  # wifv, ifv, wifn
    square_heads: bool = True  # as the official code does for attentions alone
    reference: bool = False  # the official running statistic, fixed costs, and a threshold that drops its own unit
    compensate: bool = True  # the mean of what is removed becomes a bias, when the plan is applied
    min_heads: int = 1
    min_channels: int = 1
    multiple_of: int = 1
    budget: str = "parameters"  # what the share is of: parameters, bytes, macs (a token), latency (here)
    rows: int = 1  # of latency: tokens in a forward pass

    def __post_init__(self) -> None:
        check_share("FLAP", self.parameters)
        if self.score not in KINDS:
            raise ConfigError(f'FLAP.score="{self.score}": give {", ".join(KINDS)}.')

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        widths = Widths(
            "FLAP", model, structure, self.parameters,
            min_heads=self.min_heads, min_channels=self.min_channels, multiple_of=self.multiple_of, budget=self.budget, rows=self.rows,
        )  # fmt: skip
        batches = needed("FLAP", data)
        if self.reference and count_samples(batches) < 2:
            raise DataError(
                "FLAP(reference=True) counts from the second sequence on, and there is one. Give more samples."
            )
        widths.leave_unreached(model, batches)
        seen = (running if self.reference else moments)(model, batches, widths.groups)
        found = fluctuations(model, widths.groups, seen, self.score, square_heads=self.square_heads)
        scores = {name: standard(one) for name, one in found.items()}
        if self.reference:
            counts = _by_the_code(scores, widths)
            widths = self._with_biases(model, widths, _cut(widths, counts))
        else:
            widths, counts = self._within(model, widths, scores)
        return widths_plan(self, widths, lowest_go(scores, counts), {n: float(one.mean()) for n, one in found.items()})

    def _within(self, model: nn.Module, widths: Widths, scores: Mapping[str, Tensor]) -> tuple[Widths, dict[str, int]]:
        """Counts whose model fits into the target with its biases. Attentions get theirs if one of them is cut, and MLPs: where none
        of a kind is, there is room for more of the other."""
        least = {name: one.allowed(0) for name, one in widths.sized.items()}
        cut = _cut(widths, least) if widths.target < widths.total else ()
        while True:
            counted = self._with_biases(model, widths, cut)
            check_target(counted.target, counted.total, counted.sized, "FLAP", widths.costs.unit, widths.costs.words)
            counts = above_threshold(scores, counted)
            before, cut = {group.kind for group in cut}, _cut(widths, counts)
            if before <= {group.kind for group in cut}:
                return counted, counts

    def _with_biases(self, model: nn.Module, widths: Widths, cut: Iterable[Group]) -> Widths:
        """The same with the biases counted that applying a plan which cuts these groups gives."""
        if not self.compensate or self.budget not in ("parameters", "bytes"):
            return widths
        counted = copy.copy(widths)
        given = biases_to_come(model, cut, coupled_groups(model), in_bytes=self.budget == "bytes")
        counted.total += sum(one.whole for one in given.values())
        counted.sized = {
            name: replace(one, cost=one.cost + given[name].unit) if name in given else one
            for name, one in widths.sized.items()
        }
        return counted


def _cut(widths: Widths, counts: Mapping[str, int]) -> tuple[Group, ...]:
    return tuple(group for group in widths.groups if counts[group.name] < group.units)


def standard(scores: Tensor) -> Tensor:
    """(units,): z-scores over all entries of a module, sample deviation, averaged over each unit's entries. (units, entries) ->"""
    deviation = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    if not deviation > 0:
        return scores.new_zeros(len(scores))
    return ((scores - scores.mean()) / deviation).mean(1)


def above_threshold(scores: Mapping[str, Tensor], widths: Widths) -> dict[str, int]:
    """How many units of each group lie above one threshold for all, as low as the target lets it be; floors and multiples on top."""
    pooled = sorted({value for one in scores.values() for value in one.tolist()})
    low, high = 0, len(pooled)  # keep values from pooled[index] on

    def counts(index: int) -> dict[str, int]:
        least = pooled[index] if index < len(pooled) else float("inf")
        return {name: widths.sized[name].allowed(int((one >= least).sum())) for name, one in scores.items()}

    while low < high:
        middle = (low + high) // 2
        fits = parameters_of(widths.total, widths.sized, counts(middle)) <= widths.target
        low, high = (low, middle) if fits else (middle + 1, high)
    found = counts(low)
    above = counts(low - 1) if low else found
    return fill(widths.total, widths.sized, widths.target, found, above)


def strictly_above(scores: Mapping[str, Tensor], costs: Mapping[str, float], share: float) -> dict[str, int]:
    """The code's threshold: the score where the costs of all units, from the highest score down, are nearest to `share` of all. Units of
    each group above it, itself not among them."""
    pooled = sorted(((value, costs[name]) for name, one in scores.items() for value in one.tolist()), reverse=True)
    spent = list(accumulate(cost for _, cost in pooled))
    place = min(range(len(pooled)), key=lambda at: abs(spent[at] - share * spent[-1]))
    return {name: int((one > pooled[place][0]).sum()) for name, one in scores.items()}


def code_cost(group: Group) -> float:
    """What a unit costs in the code: a channel 1, a head 4 h / 3, of a layer of three matrices against one of four."""
    return 1.0 if group.kind == "channels" else 2 * group.head_dim * (1 + group.queries) / 3


def _by_the_code(scores: Mapping[str, Tensor], widths: Widths) -> dict[str, int]:
    """As many units as the code keeps, but at least one of each group. Its ratio is of what can be cut, the target of the whole model."""
    all_units = sum(one.units * one.cost for one in widths.sized.values())
    share = 1 - (widths.total - widths.target) / all_units
    found = strictly_above(scores, {group.name: code_cost(group) for group in widths.groups}, share)
    return {name: widths.sized[name].allowed(count) for name, count in found.items()}
