"""Layer-Wise Quantization: bits by the order of a score (Dumitru et al. 2024, arXiv:2406.17415).

The paper orders blocks by LIM (how far a block turns its input; needs text) or ZD (the share of weights far above the mean; data-free) and
gives the last of the order the lower of two bit-widths. There is no official code. Departures from the paper:
D1 the average is of true bits, scales and zeros counted (`nominal` brings the paper's count back). D2 blocks of unequal size, and any
number of levels (`allocate.levels_in_order`). D3 LIM is taken from the blocks themselves, token by token (`final_norm` imitates the
authors' sibling code, which sees the last block behind the final norm). D4 layers can be ordered one by one: LIM gives all layers of a
block its score, ZD each its own. D5 matrices outside the blocks, which the paper leaves alone, are lowered last where they are asked for.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from ..allocate import by_score, levels_in_order
from ..errors import ConfigError, ScoreError
from ..plan import Plan
from ..randomness import generator_for
from ..scores import input_modification, z_score
from ..structure import Structure
from ..tasks.batches import Batches
from .base import needed
from .handing_out import BitSettings, Hand, dealt

Order = Literal["lim", "zd", "random", "front", "back"]


@dataclass(frozen=True)
class LWQ(BitSettings):
    """Defaults: the paper's pair of 4 and 2 bits, by LIM. `random`, `front` and `back` are controls."""

    name: ClassVar[str] = "lwq"
    summary: ClassVar[str] = "bits per block or layer, in the order of a score: LIM (data), ZD (weights), or a control"
    needs_data: ClassVar[bool] = True  # an object that orders by anything but LIM says False

    score: Order = "lim"  # who keeps its bits; front: the first blocks, back: the last
    reverse: bool = False  # the other way round: a control
    spread: float = 0.0  # with more than two levels: 0 uses neighbouring levels, 1 the extremes
    two_sided: bool = False  # ZD counts |z| > 1
    pooled: bool = True  # ZD of all weights of a block together; else the mean over its matrices
    final_norm: bool = False  # LIM of the last block behind the final norm
    seed: int = 0  # of score=random

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_words("score", get_args(Order))
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"LWQ.spread={self.spread:g}: give 0 (neighbouring levels) to 1 (the extremes).")
        object.__setattr__(self, "needs_data", self.score == "lim")

    @property
    def draws(self) -> bool:
        """Whether the seed matters to the method itself."""
        return self.score == "random"

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ShapeError (groups), and ScoreError for a block that has no LIM."""
        hand = dealt(self, self, model, structure)
        if self.needs_data:
            data = needed("LWQ by LIM", data)
        measured = self._measured(model, data, hand)
        scores = {unit: -value if self.reverse else value for unit, value in measured.items()}
        outside = [unit for unit in hand.units if unit not in scores]
        notes = [f"{len(outside)} layers outside the blocks have no score and are lowered last."] if outside else []
        order = [*outside, *by_score(scores)]
        levels = levels_in_order(order, hand.costs, hand.sizes, self.bits, spread=self.spread)
        return hand.plan(model, levels, measured, notes)

    def _measured(self, model: nn.Module, data: Batches | None, hand: Hand) -> dict[str, float]:
        """Unit -> score, high = keep, of those inside blocks."""
        inside = [unit for unit, layers in hand.units.items() if layers[0].block is not None]
        if self.score == "front":
            return {unit: -float(place) for place, unit in enumerate(inside)}
        if self.score == "back":
            return {unit: float(place) for place, unit in enumerate(inside)}
        if self.score == "random":
            return {unit: self._draw(unit) for unit in inside}
        if self.score == "zd":
            by, more = self.granularity, {"pooled": self.pooled, "two_sided": self.two_sided}
            shares = z_score(model, hand.structure, by=by, **more)
            # few weights far above the mean are what ZD protects: high = keep turns its sign
            scores = {name: -share for name, share in shares.items()}
        else:
            assert data is not None  # noqa: S101  (needed)
            scores = input_modification(model, data, hand.structure, final_norm=self.final_norm)
        return {unit: self._of_unit(unit, scores, hand) for unit in inside}

    def _of_unit(self, unit: str, scores: dict[str, float], hand: Hand) -> float:
        """The mean over the layers that are tied, each by its own score or that of its block."""
        by_layer = self.score == "zd" and self.granularity == "layer"
        names = dict.fromkeys(layer.name if by_layer else str(layer.block) for layer in hand.units[unit])
        if absent := [name for name in names if name not in scores]:
            raise ScoreError(
                f'block "{absent[0]}" changes the shape of what goes through it and has no LIM. Use score=zd, or least-error.'
            )
        return math.fsum(scores[name] for name in names) / len(names)

    def _draw(self, unit: str) -> float:
        """Uniform in [0, 1), a stream for each unit."""
        return torch.rand((), generator=generator_for(self.seed, f"bits:{unit}"), dtype=torch.float64).item()
