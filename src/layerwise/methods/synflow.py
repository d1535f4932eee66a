"""SynFlow: the weights that carry least flow go, a few at a time, over all layers together (Tanaka et al. 2020, arXiv:2006.05467).

Scored anew after every round, so that no layer is emptied while others are full. Needs one batch, and of it the shapes alone. Departures
from the official code: D1 exactly so many weights stay, and what went in one round never comes back. D2, D3: see `scores/synflow.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Plan
from ..scores import synflow_scores
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found
from .base import check_sparsities, needed
from .ranked import keep_highest, plan_of_masks


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
        """See `Method.plan`. Raises what `scores.synflow_scores` raises, and ScoreError where all scores are equal."""
        structure = found(model, structure)
        keep, scores = self._ranked(model, data, structure)
        return plan_of_masks(self, model, structure, self.sparsity, keep, scores)

    def keep(
        self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None
    ) -> dict[str, Tensor]:
        """Layer name -> SynFlow's own mask, bool in the stored shape, True = kept; the counts are those of `plan`."""
        return self._ranked(model, data, found(model, structure))[0]

    def _ranked(
        self, model: nn.Module, data: Batches | None, structure: Structure
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The last mask, and the scores of the whole network, from which the first round chose."""
        batches, low, high = needed("SynFlow", data), self.min_sparsity, self.max_sparsity
        whole: dict[str, Tensor] | None = None
        keep: dict[str, Tensor] | None = None
        for number in range(1, self.rounds + 1):
            scores = synflow_scores(model, batches, structure, keep=keep)
            whole = whole or scores
            if keep is not None:  # below every score: gone is gone, also where what is left carries nothing
                scores = {name: score.masked_fill(~keep[name].to(score.device), -1.0) for name, score in scores.items()}
            last = number == self.rounds
            sparsity = self.sparsity if last else 1 - (1 - self.sparsity) ** (number / self.rounds)
            # before the last round so much need not have gone yet from every layer
            keep = keep_highest(scores, sparsity, low if last else 0.0, high, owner="SynFlow's score")
        assert keep is not None and whole is not None  # noqa: S101, PT018  (at least one round)
        return keep, whole
