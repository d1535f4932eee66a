"""Adapt-Pruner: in many small steps, blocks lose heads and channels by how much they change what goes through them
(Pan et al. 2025, arXiv:2502.03460).

Before every step the model, as pruned so far, is looked at anew: the cosine of each block's input and output sets its share of the
step, the first-order Taylor score which units go. Needs text and gradients. Departures from the official code: query heads are credited
to the key head that they are cut with, products and cosines are in float32, blocks that are all alike lose evenly, and so do those that
are left when the others have nothing more to lose (there the schedule stands still for ever), the last step goes only as far as the
target asks, single channels come back where they fit, and shares of heads are added up over the blocks before they are rounded, so that
attention loses its part (but where a head is more than a quarter of it: see `attention`). `reference` follows the code instead, in the
credit, the last step and the heads.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..allocate.adaptive import channels_left, heads_left, heads_shared, next_sparsities, scaled_importance
from ..allocate.units import fill, lowest_first, parameters_of
from ..errors import ConfigError, DataError
from ..passes import check_whole, reached_blocks
from ..plan import Plan
from ..scores import block_influence
from ..scores.units import unit_taylor
from ..scores.watching import part
from ..shrink import cut_units
from ..structure import Group, Structure, coupled_groups, structure_of
from ..tasks.batches import Batches
from .base import needed
from .widths import Widths, check_share, widths_plan

_FINEST = 40  # halvings of the last step
_FEW = 4  # key/value heads of a block; with fewer channels go first. A rule of ours, from one model with three (docs/measured.md: SmolLM2)
_STALLED = 0.1  # of a step: so little on average says that what moves has nothing left (at amplitude = step one block never moves)


@dataclass(frozen=True)
class AdaptPruner:
    """Defaults: the official scripts (50 steps to nothing, amplitude 0.02, cosine, param_first)."""

    name: ClassVar[str] = "adapt-pruner"
    summary: ClassVar[str] = (
        "heads and channels in small steps, more where a block changes little of what goes through it"
    )
    needs_data: ClassVar[bool] = True

    parameters: float = 0.7  # share of the model's parameters that is kept, or their number
    step: float = 0.02  # S base: share of each group that a step takes on average
    amplitude: float = 0.02  # A: at most so much more or less, by importance
    batches: int | None = (
        None  # that a step looks at, the next ones each step, as the scripts draw anew. None: all, every step
    )
    # what heads lose for the share that channels do; 0: none while channels are left. None: 1, but 0 in blocks of fewer than four key heads
    attention: float | None = None
    scale: str = "largest"  # of importances: by the largest distance from the mean, or by rank
    reference: bool = False  # the official credit of query heads and whole last step
    min_heads: int = 1
    min_channels: int = 1
    multiple_of: int = 1
    budget: str = "parameters"  # what the share is of: parameters, bytes, macs (a token), latency (here)
    rows: int = 1  # of latency: tokens in a forward pass

    def __post_init__(self) -> None:
        check_share("AdaptPruner", self.parameters)
        if not 0 < self.step < 1 or not 0 <= self.amplitude < 1:
            raise ConfigError(
                f"AdaptPruner: step={self.step:g}, amplitude={self.amplitude:g}: give shares, step above 0."
            )
        if self.batches is not None and self.batches < 1:
            raise ConfigError(f"AdaptPruner.batches={self.batches}: give the batches that a step looks at, at least 1.")
        if self.attention is not None and not 0 <= self.attention <= 1:
            raise ConfigError(f"AdaptPruner.attention={self.attention:g}: give a share, 0 to 1.")
        if self.scale not in ("largest", "rank"):
            raise ConfigError(f'AdaptPruner.scale="{self.scale}": give largest or rank.')

    def plan(
        self,
        model: nn.Module,
        data: Batches | None = None,
        *,
        structure: Structure | None = None,
        schedule: "Schedule | None" = None,
    ) -> Plan:
        """See `Method.plan`. Works on a copy of the model, which it prunes on the way. schedule: of an earlier plan, to go on from; it is
        updated."""
        check_whole(model, "Adapt-Pruner")
        widths = Widths(
            "AdaptPruner", model, structure, self.parameters,
            min_heads=self.min_heads, min_channels=self.min_channels, multiple_of=self.multiple_of, budget=self.budget, rows=self.rows,
        )  # fmt: skip
        batches, pruned = needed("AdaptPruner", data), copy.deepcopy(model)
        widths.leave_unreached(model, batches)
        schedule = schedule or Schedule.of(model, widths.structure)
        schedule.hold({group.block for group in widths.groups})
        expected = max(1, round((1 - widths.target / widths.total) / self.step))
        looked_at = self._next(pruned, batches, schedule)
        with part(0, expected):
            turns = block_influence(pruned, looked_at, structure_of(pruned))
        unturned = {group.block for group in widths.groups} - turns.keys()  # a shape that changes has no cosine
        widths.keep_whole(unturned, "no cosine compares what enters and leaves")
        schedule.hold(turns)
        kept = {group.name: [*range(group.units)] for group in widths.groups}
        importances: dict[str, float] = {}
        steps = 0
        while parameters_of(widths.total, widths.sized, {n: len(units) for n, units in kept.items()}) > widths.target:
            with part(steps, max(steps + 1, expected)):
                if steps:
                    looked_at = self._next(pruned, batches, schedule)
                    turns = block_influence(pruned, looked_at, structure_of(pruned))
                found, importances = self._step(pruned, looked_at, widths, kept, schedule, turns)
            cut_units(pruned, found)
            kept = {
                name: [units[place] for place in found.get(name, range(len(units)))] for name, units in kept.items()
            }
            steps += 1
        notes = [f"{steps} steps of {self.step:g} on average."]
        heads = [schedule.starts[group.name] for group in widths.groups if group.kind == "heads"]
        if any(units > self.min_heads and self._of_heads(units) == 0 for units in heads):
            notes.append(
                f"Attention goes last where it has fewer than {_FEW} key/value heads a block; attention=1 cuts it alike."
                if self.attention is None
                else "Attention goes last, as asked."
            )
        return widths_plan(self, widths, kept, importances, notes)

    def _next(self, pruned: nn.Module, data: Batches, schedule: "Schedule") -> Batches:
        """What a step looks at: after the last batch comes the first again. Raises DataError where that does not come to a block that the
        step may cut."""
        if self.batches is None or self.batches >= len(data):
            return data
        first = schedule.batches % len(data)
        schedule.batches += self.batches
        found = replace(data, batches=(data.batches * 2)[first : first + self.batches])
        missed = schedule.sparsities.keys() - reached_blocks(pruned, structure_of(pruned), found)
        if missed:
            raise DataError(
                f'AdaptPruner(batches={self.batches}): none of {self.batches} batches from number {first} on comes to "{min(missed)}".'
                " Let a step look at more, or mix the data."
            )
        return found

    def _step(
        self,
        pruned: nn.Module,
        data: Batches,
        widths: Widths,
        kept: Mapping[str, list[int]],
        schedule: "Schedule",
        turns: Mapping[str, float],
    ) -> tuple[dict[str, list[int]], dict[str, float]]:
        """Group -> places, among the units that are left, that stay after one more step; updates the schedule. And importances."""
        structure, sparsities = structure_of(pruned), schedule.sparsities
        groups = [group for group in coupled_groups(pruned, structure).groups if group.name in kept]
        scores = unit_taylor(pruned, data, groups, structure, modulo=self.reference)
        importances = scaled_importance({name: turns[name] for name in sparsities}, self.scale)
        after = next_sparsities(sparsities, importances, self.step, self.amplitude)
        if sum(after.values()) - sum(sparsities.values()) < _STALLED * self.step * len(after):
            after = next_sparsities(sparsities, dict.fromkeys(importances, 0.0), self.step, 0.0)
        counts, share = self._counts(widths, kept, schedule, after)
        schedule.sparsities = _between(sparsities, after, share)
        if all(counts[name] == len(units) for name, units in kept.items()) and all(s >= 0.99 for s in after.values()):
            counts = {
                name: widths.sized[name].allowed(0) for name in kept
            }  # the schedule has ended; floors hold the rest
        return {
            group.name: lowest_first(scores[group.name].tolist(), counts[group.name]) for group in groups
        }, importances

    def _counts(
        self, widths: Widths, kept: Mapping[str, list[int]], schedule: "Schedule", after: Mapping[str, float]
    ) -> tuple[dict[str, int], float]:
        """Units after the step, or after as much of it as the target asks, and how much that is."""
        before, starts = schedule.sparsities, schedule.starts
        whole = self._left(widths, kept, starts, after)
        if self.reference or parameters_of(widths.total, widths.sized, whole) > widths.target:
            return whole, 1.0
        low, high = 0.0, 1.0
        for _ in range(_FINEST):
            middle = (low + high) / 2
            fits = (
                parameters_of(
                    widths.total, widths.sized, self._left(widths, kept, starts, _between(before, after, middle))
                )
                <= widths.target
            )
            low, high = (low, middle) if fits else (middle, high)
        found = self._left(widths, kept, starts, _between(before, after, high))
        above = self._left(widths, kept, starts, _between(before, after, low))
        # single units more, never more than are there
        now = {name: replace(widths.sized[name], units=len(units)) for name, units in kept.items()}
        total = parameters_of(widths.total, widths.sized, {name: len(units) for name, units in kept.items()})
        return fill(total, now, widths.target, found, {name: float(count) for name, count in above.items()}), high

    def _left(
        self,
        widths: Widths,
        kept: Mapping[str, list[int]],
        sizes: Mapping[str, int],
        sparsities: Mapping[str, float],
    ) -> dict[str, int]:
        """Units of each group at these sparsities of its block, of its size at the start, never more than are there."""
        wanted = {group.name: _wanted(group, sizes[group.name], sparsities[group.block]) for group in widths.groups}
        if not self.reference:
            heads = {group.name: group for group in widths.groups if group.kind == "heads"}
            starts = {name: sizes[name] for name in heads}
            shares = {name: self._of_heads(sizes[name]) * sparsities[group.block] for name, group in heads.items()}
            wanted |= heads_shared(starts, shares, {name: len(kept[name]) for name in heads})
        return {name: min(len(kept[name]), widths.sized[name].allowed(units)) for name, units in wanted.items()}

    def _of_heads(self, units: int) -> float:
        """What a block that began with so many key/value heads loses of them for the share that its channels lose."""
        if self.reference:
            return 1.0
        return float(units >= _FEW) if self.attention is None else self.attention


@dataclass
class Schedule:
    """Where the schedule stands: units of each group at the very start, the share that each block was to have lost of them, and batches
    that steps have looked at (where they do not look at all)."""

    starts: dict[str, int]
    sparsities: dict[str, float]
    batches: int = 0

    @classmethod
    def of(cls, model: nn.Module, structure: Structure | None = None) -> "Schedule":
        """At its start, of this model."""
        structure = structure or structure_of(model)
        groups = coupled_groups(model, structure).groups
        cut = {group.block for group in groups}
        return cls(
            {group.name: group.units for group in groups},
            {block.name: 0.0 for block in structure.blocks if block.name in cut},
        )

    def hold(self, blocks: Collection[str]) -> None:
        """Forget all other blocks: they stay whole."""
        self.sparsities = {name: share for name, share in self.sparsities.items() if name in blocks}


def _wanted(group: Group, units: int, sparsity: float) -> int:
    return (
        channels_left(group.units, sparsity)
        if group.kind == "channels"
        else heads_left(group.units, sparsity, group.head_dim)
    )


def _between(before: Mapping[str, float], after: Mapping[str, float], share: float) -> dict[str, float]:
    return {name: before[name] + share * (after[name] - before[name]) for name in after}


def stage_targets(start: int, end: int, stages: int) -> Iterator[int]:
    """Parameters after each stage of Adapt-Accel: P_0 - floor((P_0 - P_T) t / T)."""
    return (start - (start - end) * stage // stages for stage in range(1, stages + 1))
