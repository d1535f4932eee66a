"""How many of a block's Wanda scores stand out: D of OWL (Yin et al. 2024, arXiv:2310.05175; github.com/luuyin/OWL)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..errors import ConfigError, ScoreError
from ..passes import collect_dense
from ..passes.statistics import InputStatistics, widest
from ..structure import Block, Structure, as_matrices, parameter_of
from ..tasks.batches import Batches
from .watching import tell


def outlier_share(scores: Sequence[Tensor], factor: float) -> float:
    """Share of a block's weight scores above `factor` times their mean; high = keep more of this block.

    scores: one tensor of any shape per matrix of the block, >= 0, any unit (a common scale cancels), pooled.
    factor: dimensionless, > 1. Returns a fraction in [0, 1). Raises ScoreError if a score is not finite, or there is none.
    Source: D in Yin et al. 2024, arXiv:2310.05175; the official code's D is in percent.
    """
    return _share_above(lambda: scores, factor)


def outlier_ratio(model: nn.Module, data: Batches, structure: Structure, factor: float) -> dict[str, float]:
    """Block name -> D, the share of its Wanda scores |W| * ||X|| above `factor` times their mean; high = keep.

    All on the dense model, one forward pass, the scores of one matrix in memory at a time. Norms are over all tokens that reached a matrix,
    so a little-used expert weighs little; a matrix that no token reached (an expert) says nothing and is left out.
    Blocks without layers up for compression are not in the result. Raises ScoreError naming the block if it has no score or one is not
    finite, and what `passes.collect_dense` raises.
    """
    ratios: dict[str, float] = {}
    total = sum(bool(block.layers) for block in structure.blocks)
    tell(0, total)  # what comes before the first block can take long, too
    for block, statistics in collect_dense(model, structure, data, "squares"):
        tell(len(ratios), total, block.name)
        try:
            ratios[block.name] = _share_above(partial(_scores, model, block, statistics), factor)
        except ScoreError as error:
            raise ScoreError(f'block "{block.name}": {error}') from error
    tell(total, total)
    return {block.name: ratios[block.name] for block in structure.blocks if block.name in ratios}


def _scores(
    model: nn.Module, block: Block, statistics: Mapping[str, Sequence[InputStatistics | None]]
) -> Iterator[Tensor]:
    """|W| * ||X|| of one matrix of the block after the other."""
    for layer in block.layers:
        weight = as_matrices(parameter_of(model, layer).detach(), layer)
        for matrix, inputs in zip(weight, statistics[layer.name], strict=True):
            if inputs is not None and inputs.tokens:
                yield matrix.float().abs() * inputs.squares.sqrt().to(matrix.device)


def _share_above(scores: Callable[[], Iterable[Tensor]], factor: float) -> float:
    """See `outlier_share`. scores: called twice, for the mean and for the count, so that nobody has to hold them all."""
    if not factor > 1:
        raise ConfigError(f"outlier_share: factor={factor:g}: an outlier exceeds a multiple of the mean, factor > 1.")
    total, count = 0.0, 0
    for score in scores():
        total, count = total + _sum(score), count + score.numel()
        del score  # before the next one is made
    if not count:
        raise ScoreError("outlier_share: there are no scores.")
    mean = total / count
    if not math.isfinite(mean):
        raise ScoreError("outlier_share: a score is not finite. Accumulate input norms in float32, not float16.")
    above = 0
    for score in scores():
        above += int((score > factor * mean).sum())
        del score
    return above / count


def _sum(scores: Tensor) -> float:
    return float(scores.sum(dtype=widest(scores.device)))
