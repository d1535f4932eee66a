"""GraSP: the weights whose absence weakens the gradient least go, over all layers together (Wang et al. 2020, arXiv:2002.07376).

`grasp` has a mask of its own (`keep`) and the sparsities that it amounts to; `grasp-ratio` is those sparsities alone, for random masks
(Liu et al. 2022, arXiv:2202.02643), so that the two make the same plan. Needs batches with what the loss is taken of; the papers: 25
images of each class, in two batches. Departures from the official codes: D1 exactly so many weights stay (a threshold with "<=" takes no
tie). D2 the classes are those of the data, not ten. D3 dropout is off. D4 w * Hg, high = keep: the papers' score is its negative.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Plan
from ..scores import grasp_scores
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found
from .base import check_sparsities, needed
from .ranked import keep_highest, plan_by_rank


@dataclass(frozen=True)
class GraSP:
    """The sparsities of GraSP's mask by `plan`, the mask itself by `keep`."""

    name: ClassVar[str] = "grasp"
    summary: ClassVar[str] = "sparsities of GraSP's mask: weights that the flow of gradients needs least go"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.9
    temperature: float = 200.0  # divides the logits
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        _check("GraSP", self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises what `scores.hessian_products` raises. Scores that are all equal: uniform, with a note."""
        structure = found(model, structure)
        scores = grasp_scores(model, needed("GraSP", data), structure, temperature=self.temperature)
        return plan_by_rank(self, model, structure, scores, owner="GraSP's score")

    def keep(
        self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None
    ) -> dict[str, Tensor]:
        """Layer name -> GraSP's own mask, bool in the stored shape, True = kept; the counts are those of `plan`.

        Raises what `plan` raises, and ScoreError where all scores are equal.
        """
        structure = found(model, structure)
        scores = grasp_scores(model, needed("GraSP", data), structure, temperature=self.temperature)
        return keep_highest(scores, self.sparsity, self.min_sparsity, self.max_sparsity, owner="GraSP's score")


@dataclass(frozen=True)
class GraSPRatio:
    """Sparsities alone: the mask is drawn at random (solver `random`), so that only the shares of the layers are GraSP's."""

    name: ClassVar[str] = "grasp-ratio"
    summary: ClassVar[str] = "sparsities of GraSP's mask, meant for random masks"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.9
    temperature: float = 200.0
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        _check("GraSPRatio", self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `GraSP.plan`."""
        structure = found(model, structure)
        scores = grasp_scores(model, needed("GraSP", data), structure, temperature=self.temperature)
        return plan_by_rank(self, model, structure, scores, owner="GraSP's score")


def _check(owner: str, method: GraSP | GraSPRatio) -> None:
    check_sparsities(owner, method.sparsity, method.min_sparsity, method.max_sparsity)
    if not 0 < method.temperature < float("inf"):
        raise ConfigError(
            f"{owner}.temperature={method.temperature:g}: logits are divided by it; give a number above 0."
        )
