"""SNIP: the weights whose absence changes the loss least go, over all layers together (Lee et al. 2019, arXiv:1810.02340).

`snip` has a mask of its own (`keep`) and the sparsities that it amounts to; `snip-ratio` only sparsities, for random masks (Liu et
al. 2022, arXiv:2202.02643): its scores are those of weights drawn anew, so that they say nothing about the weights to be trained.
Needs batches with what the loss is taken of: labels for classifiers, tokens for language models. Departures from the official codes:
D1 exactly so many weights stay (a threshold with ">=" keeps all ties). D2 layers are matched by name, and norms have no score (the code of
Liu et al. pairs two lists of different filters). D3 dropout is off. D4 scores are summed over all batches given; the papers use one.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..plan import Plan
from ..scores import snip_scores
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found
from .base import check_sparsities, needed
from .ranked import keep_highest, plan_by_rank


@dataclass(frozen=True)
class SNIP:
    """The sparsities of SNIP's mask by `plan`, the mask itself by `keep`."""

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = "sparsities of SNIP's mask: weights of least |w * gradient| go, all layers together"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.9
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0  # 1: a layer may be emptied; less keeps the network connected

    def __post_init__(self) -> None:
        check_sparsities("SNIP", self.sparsity, self.min_sparsity, self.max_sparsity)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises what `scores.gradients` raises. Scores that are all equal: uniform, with a note."""
        structure = found(model, structure)
        scores = snip_scores(model, needed("SNIP", data), structure)
        return plan_by_rank(self, model, structure, scores, owner="SNIP's score")

    def keep(
        self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None
    ) -> dict[str, Tensor]:
        """Layer name -> SNIP's own mask, bool in the stored shape, True = kept; the counts are those of `plan`.

        Raises what `plan` raises, and ScoreError where all scores are equal.
        """
        scores = snip_scores(model, needed("SNIP", data), found(model, structure))
        return keep_highest(scores, self.sparsity, self.min_sparsity, self.max_sparsity, owner="SNIP's score")


@dataclass(frozen=True)
class SNIPRatio:
    """Sparsities alone: the mask is drawn at random (solver `random`), so that only the shares of the layers are SNIP's."""

    name: ClassVar[str] = "snip-ratio"
    summary: ClassVar[str] = "sparsities of SNIP's mask on redrawn weights, meant for random masks"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.9
    redraw: bool = True  # score Xavier-normal weights instead of the model's
    seed: int = 0  # of the redrawn weights
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("SNIPRatio", self.sparsity, self.min_sparsity, self.max_sparsity)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `SNIP.plan`."""
        structure = found(model, structure)
        scores = snip_scores(model, needed("SNIP", data), structure, redraw=self.redraw, seed=self.seed)
        return plan_by_rank(self, model, structure, scores, owner="SNIP's score")
