"""ZD, the share of weights far above the mean: a score of Layer-Wise Quantization (Dumitru et al. 2024, arXiv:2406.17415)."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ScoreError
from ..passes import weight_at_hand
from ..structure import Layer, Structure, as_matrices, groups_of
from .watching import tell

_PIECE = 1 << 22  # weights that are in float64 at a time

Read = Callable[[], Tensor]


def share_above(weights: Sequence[Tensor], threshold: float = 1.0, *, two_sided: bool = False) -> float:
    """Share of all weights with (w - mean) / deviation > threshold, in [0, 1]; **low = keep**: heavy tails have a smaller share.

    weights: tensors of any shape, pooled: one mean and one population deviation. two_sided: |w - mean| counts. Sums in float64, the
    count is exact. Normal weights: 0.1587, Laplace 0.1216, uniform 0.2113 at a threshold of 1.
    Raises ScoreError if a weight is not finite, there are none, or all are equal.
    """
    return _share([partial(_same, one) for one in weights], threshold, two_sided)


def z_score(
    model: nn.Module,
    structure: Structure,
    *,
    by: Literal["block", "layer"] = "block",
    pooled: bool = True,
    two_sided: bool = False,
    threshold: float = 1.0,
) -> dict[str, float]:
    """Block or layer name -> ZD; low = keep, as published. Weights alone; of a streamed model each is read when it is its turn.

    pooled: one mean and deviation for all weights of the block; else the mean of the shares of its matrices, each with its own.
    Tables (gains of norms, positions) have no part in it. Raises ScoreError naming the block or layer whose share cannot be had.
    """
    groups = {
        name: matrices
        for name, layers in groups_of(structure, by).items()
        if (matrices := [layer for layer in layers if layer.kind != "table"])
    }
    found: dict[str, float] = {}
    for name, layers in groups.items():
        tell(len(found), len(groups), name)
        try:
            if pooled:
                found[name] = _share([partial(_weight, model, layer) for layer in layers], threshold, two_sided)
            else:
                shares = [
                    share_above([matrix], threshold, two_sided=two_sided)
                    for layer in layers
                    for matrix in as_matrices(_weight(model, layer), layer)
                ]
                found[name] = math.fsum(shares) / len(shares)
        except ScoreError as error:
            raise ScoreError(f'{by} "{name}": {error}') from error
    tell(len(groups), len(groups))
    return found


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    return weight_at_hand(model, layer.parameter)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _share(reads: Sequence[Read], threshold: float, two_sided: bool) -> float:
    """Each is read twice, since the count needs mean and deviation of all."""
    size, mean, squares = 0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for piece in _pieces(reads):
        # moments of the pieces merged (Chan et al. 1979): no sum of squares is taken about a far-off zero
        own, away = float(piece.mean()), piece.numel()
        gap, total = own - mean, size + away
        squares += float((piece - own).square().sum()) + gap * gap * size * away / total
        mean, size = mean + gap * away / total, total
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if not size:
        raise ScoreError("there are no weights to score.")
    if not math.isfinite(squares):
        raise ScoreError("a weight is not finite.")
    if low == high:
        raise ScoreError(f"all {size} weights are {low:g}, and have no z-score. Leave it out.")
    limit = threshold * math.sqrt(squares / size)
    return sum(_count(piece - mean, limit, two_sided) for piece in _pieces(reads)) / size


def _count(away: Tensor, limit: float, two_sided: bool) -> int:
    return int(((away.abs() if two_sided else away) > limit).sum())


def _pieces(reads: Sequence[Read]) -> Iterator[Tensor]:
    for read in reads:
        values = read().detach()
        values = values.cpu() if values.device.type == "mps" else values  # which has no float64
        for piece in torch.split(values.flatten(), _PIECE):
            if piece.numel():
                yield piece.to(torch.float64)
