"""What the solvers that only choose a mask share: patterns, comparison groups, and what to do without data."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, SolveError
from ..passes.statistics import InputStatistics, widest
from ..plan import Prune, Treatments
from .base import Solved
from .select import expanded, keep_blocks, keep_lowest_out, keep_nm, keep_per_row, spread

Compare = Literal["row", "layer"]


def check_compare(solver: str, compare: str) -> None:
    """Raise ConfigError unless `compare` names a comparison group."""
    if compare not in ("row", "layer"):
        raise ConfigError(f'{solver}.compare="{compare}": give "row" or "layer", the weights that compete for staying.')


def calibrated(solver: str, inputs: InputStatistics | None, other: str = "") -> InputStatistics:
    """The statistics. Raises ConfigError where there are none, offering the solver that needs none."""
    if inputs is None:
        raise ConfigError(
            f"{solver} needs calibration data: give inputs{f', or use the solver {other}' if other else ''}."
        )
    return inputs


def check_weights(weights: Sequence[Tensor], inputs: InputStatistics | None) -> None:
    """Raise unless the weights are finite matrices with as many columns as the inputs have statistics."""
    if inputs is not None and (bad := inputs.squares.numel() - int(inputs.squares.isfinite().sum())):
        raise SolveError(f"{bad} of {inputs.squares.numel()} inputs are not finite on the calibration data.")
    for weight in weights:
        if weight.dim() != 2:
            raise ShapeError(f"a weight of shape {tuple(weight.shape)} is not a matrix of (rows, columns).")
        if inputs is not None and inputs.squares.shape[0] != weight.shape[1]:
            raise ShapeError(
                f"a weight with {weight.shape[1]} columns does not fit statistics of {inputs.squares.shape[0]} inputs."
            )
        if not torch.isfinite(weight.sum()) and (bad := weight.numel() - int(weight.isfinite().sum())):
            raise SolveError(
                f"weight has {bad} non-finite value{'s' if bad > 1 else ''} (NaN or infinity). The model is damaged:"
                " load it again, or leave this layer out of the plan."
            )


def why_blind(inputs: InputStatistics) -> str | None:
    """Why these inputs say nothing about the weights, which are then treated by themselves; None for useful inputs."""
    if not inputs.called:
        why = "the model uses its weight directly, or sent no token there"
        return f"its module was never called on calibration data ({why})"
    if inputs.tokens == 0:
        return "no calibration token reached it"
    if not inputs.squares.any():
        return "its inputs are zero on all calibration tokens"
    return None


def magnitude_solved(weight: Tensor, prune: Prune, compare: Compare, why: str) -> Solved:
    """Prune by |weight| alone, and say why."""
    keep = keep_by_score(weight.abs(), prune, compare)
    return masked(weight, keep, note=f"{why}: pruned by magnitude")


def mask_all(
    weights: Sequence[Tensor],
    scores: Iterable[Tensor],
    prunes: Sequence[Prune],
    inputs: InputStatistics | None,
    compare: Compare = "layer",
    *,
    reference: bool = False,
) -> list[Solved]:
    """Each weight without its lowest scores; `reference`: by the counts and ties of the official code. scores: made as they are used."""
    keep = reference_keep_by_score if reference else keep_by_score
    return [
        masked(weight, keep(score, prune, compare), inputs)
        for weight, score, prune in zip(weights, scores, prunes, strict=True)
    ]


def masked(weight: Tensor, keep: Tensor, inputs: InputStatistics | None = None, note: str | None = None) -> Solved:
    """Zeros where not kept, everything else bit-identical. Multiplying by the mask would leave negative zeros."""
    new = weight.masked_fill(~keep, 0.0)
    return Solved(new, keep, output_error(weight - new, inputs), (note,) if note else ())


def output_error(change: Tensor, inputs: InputStatistics | None) -> float | None:
    """||change X||^2 summed over the calibration tokens = trace(change gram change^T); None without the gram."""
    if inputs is None or inputs.gram is None:
        return None
    return max(float(((change @ inputs.gram) * change).sum(dtype=widest(change.device))), 0.0)


def keep_by_score(scores: Tensor, prune: Prune, compare: Compare) -> Tensor:
    """Keep the highest scores in the pattern asked for. scores: (rows, columns) >= 0 -> bool, same shape.

    `compare` matters to the unstructured pattern only: n:m compares within its groups; rows, columns and blocks compete with
    their like over the whole matrix by the sum of their squared scores, unless the plan names the blocks.
    """
    rows, columns = scores.shape
    if nm := prune.nm:
        return keep_nm(scores, *nm)
    if prune.pattern == "row":
        return keep_blocks(scores, prune.sparsity, 1, columns)
    if prune.pattern == "column":
        return keep_blocks(scores, prune.sparsity, rows, 1)
    if block := prune.block:
        return planned_blocks(prune, scores) if prune.kept else keep_blocks(scores, prune.sparsity, *block)
    pruned = round(prune.sparsity * scores.numel())
    if compare == "layer":
        return keep_lowest_out(scores, pruned)
    return keep_per_row(scores, spread(pruned, [columns] * rows))


def planned_blocks(prune: Prune, like: Tensor) -> Tensor:
    """The blocks that the plan names, as a mask of the shape and device of `like`. Raises ShapeError where they are not its blocks."""
    rows, columns = like.shape
    if problems := Treatments(prune=prune).problems(rows, columns):
        raise ShapeError(problems[0])
    height, width = prune.block or (1, 1)
    grid = torch.tensor(prune.blocks_kept(rows * columns // (height * width)), device=like.device)
    return expanded(grid.reshape(rows // height, columns // width), height, width)


def reference_keep_by_score(scores: Tensor, prune: Prune, compare: Compare) -> Tensor:
    """The masks of the official code (github.com/locuslab/wanda), with its faults, so that published numbers can be matched.

    Row: int(columns * sparsity) in each row, ties prune the lower index. Layer: everything up to the threshold
    sorted[int(size * sparsity)] inclusive, so one too many and all ties. n:m: `topk`, whose choice among ties is torch's.
    Where the official code would index out of range (sparsity 1) all is pruned; patterns that it lacks are exact.
    """
    rows, columns = scores.shape
    prune_mask = torch.zeros_like(scores, dtype=torch.bool)
    if nm := prune.nm:
        n, m = nm
        if columns % m:
            return keep_nm(scores, n, m)  # raises
        groups = scores.reshape(rows, columns // m, m)
        lowest = groups.topk(m - n, dim=-1, largest=False).indices
        return ~prune_mask.view_as(groups).scatter_(-1, lowest, True).reshape(rows, columns)
    if prune.pattern != "unstructured":
        return keep_by_score(scores, prune, compare)
    if compare == "layer":
        return ~reference_prune(scores, prune.sparsity)
    order = scores.sort(dim=1, stable=True).indices
    return ~prune_mask.scatter_(1, order[:, : int(columns * prune.sparsity)], True)


def reference_prune(scores: Tensor, sparsity: float) -> Tensor:
    """True where the official threshold rule prunes: scores <= sorted[int(size * sparsity)]."""
    place = min(int(scores.numel() * sparsity), scores.numel() - 1)
    return scores <= scores.flatten().sort().values[place]
