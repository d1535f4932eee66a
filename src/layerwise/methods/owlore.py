"""OwLore, also called OWS: blocks with more outliers are trained more often (Li et al. 2024, arXiv:2405.18380; github.com/pixeli99/OwLore).

A plan of training: `train: {probability: ...}` for each block, D of OWL over its sum. `sampling` is the run: every `period` steps `blocks`
blocks are drawn, and their matrices are trained in a low-rank subspace. Departures from the official code:
D1 D is computed, of any model (it reads a file made for one). D2 a model without outliers gets the same probability everywhere, with a
note (it divides by zero). D3 exactly `blocks` are drawn, as the code does; draw=independent is what the paper's text says. D4 whether what
lies outside the blocks is trained is a setting: it costs more than the blocks do. D5 a floor, so that no block starves. Those of the
training are in `recover.sampling` and `recover.low_rank`. Make the plan on the dense model: the zeros of a pruned one lower the mean that
an outlier is measured by.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from ..errors import ConfigError, ModelError
from ..plan import Budget, Plan, Train
from ..recover import LayerSampling, LowRank, probabilities_of, rates_of
from ..recover.draw import Draw, check_draw, normalised
from ..recover.sampling import State
from ..scores import outlier_ratio
from ..structure import Structure, structure_of
from ..tasks.batches import Batches
from .assemble import found, named_plan
from .base import needed

By = Literal["outliers", "uniform", "decrease", "increase", "reverse"]
Policy = Literal["auto", "keep", "reset", "offload"]


@dataclass(frozen=True)
class OwLore:
    """Defaults: the paper's script, with GaLore's rank of 128. Without data: score=uniform is LISA, decrease its variant LISA-D."""

    name: ClassVar[str] = "owlore"
    summary: ClassVar[str] = (
        "which blocks are trained how often: those with more outlier Wanda scores more (a plan of training)"
    )
    needs_data: ClassVar[bool] = True  # an object that draws by position says False

    score: By = "outliers"  # decrease: L, L-1, ..., 1; increase; reverse: the most outliers get 0. Controls
    outlier_factor: float = 13.0  # M: an outlier exceeds M times the mean score of its block
    floor: float = 0.0  # e: p becomes (1 - e) * p + e / L, so that every block is trained some time
    blocks: int = 5  # n: trained in a period
    period: int = 50  # K: steps of the optimiser from one draw to the next
    draw: Draw = "exact"
    rank: int = 128  # of the updates of matrices in blocks; 0: full rank
    gap: int = 0  # steps after which a projector is computed anew; 0: at every activation
    scale: float = 1.0
    always: str = (
        "*"  # globs, comma-separated: parameters outside the blocks that are trained in every step; "" freezes all
    )
    state: Policy = "auto"  # of a block that leaves, the optimiser's; auto: keep in low rank, reset in full
    seed: int = 0

    def __post_init__(self) -> None:
        for field, words in (("score", By), ("draw", Draw), ("state", Policy)):
            if (value := getattr(self, field)) not in get_args(words):
                raise ConfigError(f'OwLore.{field}="{value}": give one of {", ".join(get_args(words))}.')
        if not self.outlier_factor > 1:
            raise ConfigError(f"OwLore.outlier_factor={self.outlier_factor:g}: give a multiple of the mean, > 1.")
        if not 0 <= self.floor <= 1:
            raise ConfigError(
                f"OwLore.floor={self.floor:g}: give the share of the probability that is spread evenly, 0 to 1."
            )
        for field, least in (("blocks", 1), ("period", 1), ("rank", 0), ("gap", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"OwLore.{field}={getattr(self, field)}: give a whole number, at least {least}.")
        if self.rank:
            LowRank(self.rank, self.gap, self.scale)
        object.__setattr__(self, "needs_data", self.score in ("outliers", "reverse"))

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """A probability for each block, sum 1. Raises ConfigError if fewer than `blocks` can be drawn, and what `outlier_ratio` raises."""
        structure = found(model, structure)
        names = [block.name for block in structure.blocks if block.layers]
        if not names:
            raise ModelError(f"OwLore draws blocks, and {type(model).__name__} has none with layers.")
        check_draw(dict.fromkeys(names, 1.0), self.blocks, self.draw)  # before the work
        if self.needs_data:
            scores = outlier_ratio(model, needed("OwLore", data), structure, self.outlier_factor)
        else:
            scores = {name: self._by_place(place, len(names)) for place, name in enumerate(names)}
        top = max(scores.values())
        weights = {name: top - score for name, score in scores.items()} if self.score == "reverse" else scores
        notes = []
        if not any(weights.values()):
            what = f"more than {self.outlier_factor:g} times its mean" if top == 0 else "more than another"
            notes.append(
                f"no block has scores {what}, so all have the same probability; a lower outlier_factor may tell them apart"
            )
            weights = dict.fromkeys(names, 1.0)
        even = self.floor / len(names)
        shares = {name: (1 - self.floor) * share + even for name, share in normalised(weights).items()}
        self._check_enough(shares)
        trains = {name: Train(probability=share) for name, share in shares.items()}
        return named_plan(self, model, structure, Budget(), trains, scores, notes)

    def sampling(self, model: nn.Module, plan: Plan) -> LayerSampling:
        """The run of this plan, one of `plan` or edited by hand, with these settings: `LayerSampling` of its probabilities and rates.

        From a file alone: `method_from(**plan.method).sampling(model, plan)`. Raises PlanError if the plan is for another model.
        """
        structure = structure_of(model, include=["*"])
        blocks = [block.name for block in structure.blocks]
        plan.check(structure.layers, blocks=blocks, attentions=structure.attentions, fingerprint=structure.fingerprint)
        state: State | None = None if self.state == "auto" else self.state
        return LayerSampling(
            model,
            probabilities_of(plan),
            blocks=self.blocks,
            period=self.period,
            draw=self.draw,
            always=[glob.strip() for glob in self.always.split(",") if glob.strip()],
            low_rank=LowRank(self.rank, self.gap, self.scale) if self.rank else None,
            state=state,
            rates=rates_of(plan),
            seed=self.seed,
        )

    def _by_place(self, place: int, blocks: int) -> float:
        return {"decrease": float(blocks - place), "increase": float(place + 1)}.get(self.score, 1.0)

    def _check_enough(self, shares: dict[str, float]) -> None:
        able = sum(share > 0 for share in shares.values())
        if able < self.blocks:
            raise ConfigError(
                f"OwLore.blocks={self.blocks}: {able} of {len(shares)} blocks have outliers and can be drawn. Lower outlier_factor"
                f" ({self.outlier_factor:g}), give a floor above 0, or ask for fewer blocks."
            )
