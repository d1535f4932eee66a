"""Adam in a low-rank subspace of each gradient (GaLore, Zhao et al. 2024, arXiv:2403.03507; github.com/jiaweizzhao/GaLore).

Of a weight (m, n) with gradient G only G P^T (or P^T G) of rank r has moments, P being the leading singular vectors on the shorter side.
Departures from the official optimiser, which `moments="kept"` and a `gap` bring back:
D1 moments and projectors are float32 whatever the gradient: in bfloat16 0.999 * v rounds back to v. D2 projectors are plain tensors in the
state, so that checkpoints are read without unpickling. D3 when P changes the moments are turned into its coordinates: there they were in a
basis that no longer exists, of arbitrary signs. D4 a refresh on demand, for blocks that come back, beside one every `gap` steps.
D5 weight decay is read from every group, and matrices are those of the group, not those whose names hold "attn" or "mlp".
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError, SolveError

Moments = Literal["turned", "kept"]


@dataclass(frozen=True)
class LowRank:
    """How the matrices of a parameter group are projected.

    rank: singular vectors kept, at most the shorter side. gap: steps of a weight after which its projector is computed anew; 0: only when
    it is asked for (`refresh`). scale: of the step, dimensionless; GaLore's pre-training uses 0.25, OwLore 1.
    """

    rank: int = 128
    gap: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.gap < 0 or not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(
                f"LowRank(rank={self.rank}, gap={self.gap}, scale={self.scale:g}): give rank >= 1, gap >= 0 and scale > 0."
            )


class LowRankAdam(Optimizer):
    """Adam as GaLore's and Hugging Face's: eps is added to the uncorrected root, and weights decay after the step.

    params: parameters or groups; a group with `rank` (and `gap`, `scale`, as in `LowRank`) is projected, the last two axes of its
    parameters being the matrix, every matrix of a tensor on its own; others are plain Adam. `parameter_groups` makes such groups.
    moments: "turned" into the new coordinates at a refresh, or "kept" as they are. State takes 4 * (2 * r * max + r * min) bytes
    of a matrix with these sides, else 8 a weight. Raises ConfigError for a setting out of range or a vector in a group with a rank.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        moments: Moments = "turned",
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                f"LowRankAdam: lr={lr:g}, betas={betas}, eps={eps:g}, weight_decay={weight_decay:g}: give lr >= 0, betas in [0, 1), eps > 0"
                " and weight_decay >= 0."
            )
        if moments not in get_args(Moments):
            raise ConfigError(f'LowRankAdam: moments="{moments}": give turned or kept.')
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        super().__init__(params, {**defaults, "rank": None, "gap": 0, "scale": 1.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rank"] is None:
            return
        LowRank(group["rank"], group["gap"], group["scale"])
        if flat := [tuple(one.shape) for one in group["params"] if one.ndim < 2]:
            raise ConfigError(
                f"LowRankAdam: a parameter of shape {flat[0]} is in a group with rank={group['rank']}; it is no matrix. Give"
                " vectors a group without a rank."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Raises SolveError where a projector is due and the gradient is not finite; parameters before that one have been moved."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def refresh(self, parameter: Tensor) -> None:
        """Compute its projector anew at its next step. Parameters without one are passed by."""
        if "projector" in self.state.get(parameter, {}):
            self.state[parameter]["due"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep their float32: torch would round them to the dtype of the weights."""
        super().load_state_dict(state_dict)
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        given = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(given, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state, gradient = self.state[parameter], cast(Tensor, parameter.grad).to(wide)
        steps = state.get("steps", 0)
        if group["rank"] is not None:
            due = "projector" not in state or state.get("due") or (group["gap"] and steps % group["gap"] == 0)
            if due:
                if "projector" not in state and not gradient.any():
                    return  # nothing came this way yet, so there is no direction to follow
                self._project(state, gradient, group)
            projector = state["projector"]
            gradient = gradient @ projector.mT if _tall(gradient) else projector.mT @ gradient
        if "mean" not in state:
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        first, second = group["betas"]
        state["steps"] = steps = steps + 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
        change = state["mean"] / (state["square"].sqrt() + group["eps"])
        if group["rank"] is not None:
            change = change @ projector if _tall(parameter) else projector @ change
            rate *= group["scale"]
        parameter.copy_(parameter.to(wide).sub_(change, alpha=float(rate)))
        if group["weight_decay"]:
            parameter.mul_(1 - float(group["lr"]) * group["weight_decay"])

    def _project(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
        """A new projector from this gradient, the moments turned with it."""
        new, old = projector_of(gradient, group["rank"]), state.get("projector")
        if old is not None and "mean" in state and group["moments"] == "turned":
            state["mean"], state["square"] = turned(state["mean"], state["square"], old, new, tall=_tall(gradient))
        state["projector"] = new
        state.pop("due", None)


def projector_of(gradient: Tensor, rank: int) -> Tensor:
    """The leading singular vectors on the shorter side of a float32 gradient (..., m, n), m >= n: (..., r, n), else (..., m, r).

    r = min(rank, m, n). Orthonormal; of each vector the entry of largest size is positive, so that every machine has the same signs.
    Raises SolveError if the gradient is not finite.
    """
    if not gradient.isfinite().all():
        raise SolveError(
            f"a gradient of shape {tuple(gradient.shape)} is not finite, so it has no subspace. Lower the learning rate, clip gradients,"
            " or train in bfloat16 or float32."
        )
    # eigenvectors of the product with itself, in float64 so that squaring costs no digits: faster than the vectors on both sides
    exact = (gradient.cpu() if gradient.device.type == "mps" else gradient).double()
    vectors = torch.linalg.eigh(exact.mT @ exact if _tall(exact) else exact @ exact.mT).eigenvectors
    rows: Tensor = vectors[..., -rank:].flip(-1).mT.to(gradient)
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    rows = rows * torch.where(largest < 0, -1.0, 1.0)
    return (rows if _tall(gradient) else rows.mT).contiguous()


def turned(mean: Tensor, square: Tensor, old: Tensor, new: Tensor, *, tall: bool) -> tuple[Tensor, Tensor]:
    """Both moments in the coordinates of the new projector; what the old one holds and the new one does not is forgotten.

    The first is projected. Of the second a coordinate gets the mean of the old ones, weighed by the squared cosines to them: where both
    projectors span the same space that is its value under uncorrelated gradients; a direction that is all new gets the plain mean, since a
    second moment of zero would make its first steps many times too long.
    """
    if not tall:
        mean, square = turned(mean.mT, square.mT, old.mT, new.mT, tall=True)
        return mean.mT.contiguous(), square.mT.contiguous()
    cosines = old @ new.mT  # (..., r, r): every old vector against every new one
    weights = cosines.square()
    total = weights.sum(-2, keepdim=True)
    weights = torch.where(total > 1e-6, weights / total.clamp_min(1e-6), 1.0 / weights.shape[-2])
    return mean @ cosines, square @ weights


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]
