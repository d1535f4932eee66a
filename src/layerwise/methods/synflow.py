"""SynFlow: the weights that carry least flow go, a few at a time, over all layers together (Tanaka et al. 2020, arXiv:2006.05467).

Scored anew after every round, so that no layer is emptied while others are full. That holds for networks of ReLUs; in attention, queries
and keys carry next to no flow, since all tokens of an input of ones look alike, and are emptied first: the plan has a note, and
`max_sparsity` keeps some. Needs one batch, and of it the shapes alone. Departures from the official code, beside those of
`scores/synflow.py`: D3 exactly so many weights stay, and what went in one round never comes back.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Plan
from ..scores import synflow_scores, tell
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found
from .base import check_sparsities, needed
from .ranked import keep_highest, plan_by_rank


@dataclass(frozen=True)
class SynFlow:
    """The sparsities of SynFlow's mask by `plan`, the mask itself by `keep`."""

    name: ClassVar[str] = "synflow"
    summary: ClassVar[str] = "sparsities of SynFlow's mask: weights that carry least flow go, in many rounds; no labels"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.9
    rounds: int = 100  # the density after round k of n is density ** (k / n)
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("SynFlow", self.sparsity, self.min_sparsity, self.max_sparsity)
        if self.rounds < 1:
            raise ConfigError(f"SynFlow.rounds={self.rounds}: give at least 1.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises what `scores.synflow_scores` raises. Scores that are all equal: uniform, with a note.

        The scores in the plan are those of the whole network, from which the first round chooses.
        """
        structure = found(model, structure)
        scores = synflow_scores(model, needed("SynFlow", data), structure)

        def rank() -> dict[str, Tensor]:
            return self._pruned(model, data, structure, scores)

        return plan_by_rank(self, model, structure, scores, owner="SynFlow's score", rank=rank)

    def keep(
        self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None
    ) -> dict[str, Tensor]:
        """Layer name -> SynFlow's own mask, bool in the stored shape, True = kept; the counts are those of `plan`.

        Raises what `plan` raises, and ScoreError where all scores are equal.
        """
        structure = found(model, structure)
        return self._pruned(model, data, structure, synflow_scores(model, needed("SynFlow", data), structure))

    def _pruned(
        self, model: nn.Module, data: Batches | None, structure: Structure, scores: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The mask after all rounds; scores: of the whole network, and empty afterwards, so that no two rounds' are held together."""
        low, high, keep = self.min_sparsity, self.max_sparsity, dict[str, Tensor]()
        for number in range(1, self.rounds + 1):
            tell(number - 1, self.rounds, f"round {number}")
            if keep:  # what went is below every score, also where what is left carries nothing: gone is gone
                scores = synflow_scores(model, needed("SynFlow", data), structure, keep=keep)
                for name, score in scores.items():
                    score.masked_fill_(~keep[name], -1.0)
            last = number == self.rounds
            sparsity = self.sparsity if last else 1 - (1 - self.sparsity) ** (number / self.rounds)
            # before the last round so much need not have gone yet from every layer
            keep = keep_highest(scores, sparsity, low if last else 0.0, high, owner="SynFlow's score")
            scores.clear()
        tell(self.rounds, self.rounds)
        return keep
