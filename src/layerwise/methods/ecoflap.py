"""ECoFLaP: sparsity by how much the loss feels each block, over all towers of a model at once (Sung et al. 2024, arXiv:2310.02998).

Stage 1 scores every layer by the gradient of the model's own loss, without a backward pass (zeroth order) or with one (first order),
and shares the weights that are kept beyond a floor out in proportion to the sums over blocks. It is counts that are shared: of blocks
with equal scores the smaller ends denser. Stage 2 is any solver; wanda in the paper.
Departures from the official code:
D1 weights come back bit for bit (it undoes the noise by arithmetic, which leaves half-precision weights changed). D2 the perturbation is
2 % of a layer's root mean square, 10 % in half precision, and measured after rounding (it is 1e-3 whatever the weights, of which
bfloat16 swallows a part): `reference` brings 1e-3 back. D3 whole weights meet the budget (it rounds every group up). D4 groups of score
0 take what full ones leave (its loop does not end), and scores that are all equal or 0 give the uniform plan, with a note (0 / 0 in the
code). D5 every tower of the structure takes part, a Q-Former too: exclude it to follow the paper. D6 the loss behind the last block is
linear (`tail`, see `passes.Replays`). D7 the score is the mean over batches, an estimate of the gradient's norm, where the code sums: a
common factor. D8 `draws` multiplies the passes: every batch is scored so many times (the code counts each repeat as samples used up, so
that more directions mean fewer batches). D9 stage 2 is the solver's own business: one setting for all towers (with its Wanda the code
compares the scores of EVA's and BLIP's vision towers over a whole matrix, and those of language and of CLIP row by row; here `compare` of
the solver serves both).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import nn

from ..allocate import check_feasible, proportional
from ..errors import ConfigError, DataError, ModelError
from ..passes import Tail
from ..plan import Plan
from ..scores import first_order_gradient, zeroth_order_gradient
from ..structure import Granularity, Layer, Structure, groups_of, parameter_of, towers_of
from ..tasks.batches import Batches, count_samples
from .assemble import found, plan_of, sizes_of
from .base import check_sparsities

Order = Literal["zeroth", "first"]


@dataclass(frozen=True)
class ECoFLaP:
    """Defaults: the official BLIP-2 scripts at 50 %. Time of the zeroth order: two passes per layer and batch, each from its block on."""

    name: ClassVar[str] = "ecoflap"
    summary: ClassVar[str] = (
        "one sparsity per block, lower where the loss feels its weights, over vision and language together"
    )
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.5  # S: fraction of the prunable weights set to zero
    order: Order = "zeroth"  # first: |weight| * |gradient|, a backward pass; faster, and needs the memory of training
    granularity: Granularity = "block"  # what shares one sparsity: layer, block or tower
    per_tower: bool = False  # every tower meets the sparsity by itself, instead of all together
    average: bool = False  # groups by the mean score of their weights, not the sum: the official T5 script
    samples: int | None = None  # of the data, for the scores. None: 32 (zeroth) or 128 (first); a number once made
    draws: int = 1  # directions per batch, zeroth order
    step: float = 0.02  # perturbation over the weights, root mean squares; five times that in half precision
    reference: bool = False  # a perturbation of 1e-3 whatever the weights, as published
    joint: bool = (
        False  # move a block's layers at once: far fewer passes, the norm of the block's gradient instead of the sum
    )
    tail: Tail = "linear"  # or "exact": run head and loss in every pass
    seed: int = 0
    min_sparsity: float = 0.0
    max_sparsity: float | None = None  # p: None is sparsity + 0.1; a number once made

    def __post_init__(self) -> None:
        for field, words in (
            ("order", get_args(Order)),
            ("granularity", get_args(Granularity)),
            ("tail", get_args(Tail)),
        ):
            if getattr(self, field) not in words:
                raise ConfigError(f'ECoFLaP.{field}="{getattr(self, field)}": give {", ".join(words)}.')
        check_sparsities("ECoFLaP", self.sparsity)
        cap = self.max_sparsity
        if cap is None:
            cap = min(1.0, max(round(self.sparsity + 0.1, 10), self.min_sparsity))
        object.__setattr__(self, "max_sparsity", cap)
        check_sparsities("ECoFLaP", self.sparsity, self.min_sparsity, cap)
        samples = (32 if self.order == "zeroth" else 128) if self.samples is None else self.samples
        object.__setattr__(self, "samples", samples)
        if samples < 1 or self.draws < 1 or not 0 < self.step < 1:
            raise ConfigError(
                f"ECoFLaP.samples={samples}, draws={self.draws}, step={self.step:g}: give at least 1 sample and 1 draw, and"
                " 0 < step < 1."
            )
        if self.joint and (self.granularity == "layer" or self.order == "first"):
            raise ConfigError(
                f'ECoFLaP.joint goes with order="zeroth" and blocks or towers, not {self.order}, {self.granularity}.'
            )

    def plan(
        self,
        model: nn.Module,
        data: Batches | None = None,
        *,
        structure: Structure | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Plan:
        """One sparsity per group, the same for all its layers up to whole weights. Layers outside the groups get the target.

        scores: of the groups, as an earlier plan holds them: they do not depend on the sparsity, and take nearly all of the time.
        Raises what the score raises too: DataError (batches without labels), ModelError (a model without a loss that is known).
        """
        structure = found(model, structure)
        groups = groups_of(structure, self.granularity)
        if not groups:
            raise ModelError(
                f"ECoFLaP shares sparsity out over {self.granularity}s, and {type(model).__name__} has none with layers up for"
                " compression. Give granularity=layer, or use erk or uniform, which need no blocks."
            )
        if data is None or not len(data):
            raise DataError("ECoFLaP looks at the loss of batches and needs calibration data (--data).")
        low, high = self.min_sparsity, cast(float, self.max_sparsity)
        check_feasible(sizes_of(structure), self.sparsity, low, high)  # before the work
        if scores is None:
            scored = structure if self.granularity == "layer" else replace(structure, outside=())  # no group has those
            scores = self._over_groups(self._scored(model, data, scored), groups)
        elif missing := sorted(groups.keys() - scores.keys()):
            raise ConfigError(
                f'scores: none for "{missing[0]}" ({len(missing)} such). Give those of a plan of this model.'
            )
        by_group: dict[str, float] = {}
        notes = self._doubts(data, {parameter_of(model, layer).dtype for layer in structure})
        for where, names in self._budgets(structure, groups).items():
            mine, note = self._shared({name: scores[name] for name in names}, groups)
            by_group |= mine
            notes += [f"{where}{note}"] if note else []
        sparsities = dict.fromkeys(sizes_of(structure), self.sparsity)
        for group, layers in groups.items():
            sparsities |= dict.fromkeys((layer.name for layer in layers), by_group[group])
        return plan_of(self, model, structure, self.sparsity, sparsities, low, high, scores, notes)

    def _scored(self, model: nn.Module, data: Batches, structure: Structure) -> dict[str, float]:
        """Layer name (joint: block name) -> score."""
        if self.order == "first":
            return first_order_gradient(model, data, structure, samples=self.samples)
        return zeroth_order_gradient(
            model, data, structure, step=self.step, samples=self.samples, draws=self.draws, joint=self.joint,
            reference=self.reference, tail=self.tail, seed=self.seed,
        )  # fmt: skip

    def _doubts(self, data: Batches, dtypes: set[torch.dtype]) -> list[str]:
        """What makes the scores less than they were asked to be."""
        held, notes = count_samples(data), []
        if held < cast(int, self.samples):
            notes.append(f"scores from all {held} samples of the data, fewer than samples={self.samples}.")
        if self.order == "zeroth" and (half := [str(one) for one in dtypes if one.itemsize < 4]):
            kind = min(half).removeprefix("torch.")
            notes.append(
                f"zeroth-order scores of {kind} weights hold its rounding: float32 or order=first tell blocks apart better."
            )
        return notes

    def _over_groups(self, scores: Mapping[str, float], groups: Mapping[str, tuple[Layer, ...]]) -> dict[str, float]:
        """Sums, or means over weights. A jointly moved block counts once."""
        summed = {}
        for group, layers in groups.items():
            units = dict.fromkeys(layer.block or layer.name if self.joint else layer.name for layer in layers)
            total = sum(scores[unit] for unit in units)
            summed[group] = total / sum(layer.size for layer in layers) if self.average else total
        return summed

    def _budgets(self, structure: Structure, groups: Mapping[str, tuple[Layer, ...]]) -> dict[str, list[str]]:
        """What to write in front of a note -> the groups that share one budget."""
        if not self.per_tower:
            return {"": list(groups)}
        tower_of = {
            block.name: tower
            for tower, stacks in towers_of(structure).items()
            for stack in stacks
            for block in stack.blocks
        }
        budgets: dict[str, list[str]] = {}
        for group, layers in groups.items():
            tower = tower_of.get(layers[0].block or "", "outside the towers")
            budgets.setdefault(f"{tower}: ", []).append(group)
        return budgets

    def _shared(
        self, scores: Mapping[str, float], groups: Mapping[str, tuple[Layer, ...]]
    ) -> tuple[dict[str, float], str | None]:
        """Group -> sparsity of the groups of one budget, and what the user should know."""
        sizes = {name: sum(layer.size for layer in groups[name]) for name in scores}
        if len(scores) > 1 and len(set(scores.values())) == 1:
            what = "0" if not any(scores.values()) else "equal"
            return dict.fromkeys(
                scores, self.sparsity
            ), f"all {len(scores)} scores are {what}, which says nothing: uniform."
        low, high = self.min_sparsity, cast(float, self.max_sparsity)
        return proportional(scores, sizes, self.sparsity, low, high), None
