"""SparseGPT: prune column by column, and let the weights that stay make up for it (Frantar & Alistarh 2023, arXiv:2301.00774).

Needs the gram X^T X of the inputs. The paper's Hessian is 2 / sequences times that; a constant factor changes nothing.
The official code inverts the damped Hessian H and factors the inverse, H^-1 = U^T U. The same weights come out of the factor
H = M M^T alone, U being M^-1: with D the change of the columns left of a block, the compensated weights of the block are
W + (D M[left, block]) U[block, block], and only 128-wide diagonal blocks are ever inverted. It saves over two thirds of the factorisation.

Departures from the official code: D1 exact counts, ties keep the lower index (`reference=True` prunes one too many in each
column block, as published). D2 dead inputs are pruned first, but kept weights on them are not zeroed. D3 a failed factorisation raises the
damping and says so. D4 without calibration tokens: by magnitude, with a note. D5 n:m groups never straddle column blocks.

Beyond the paper: blocks, rows and columns. Which of them go is chosen once, over the whole matrix, by the error that each alone would
leave when the columns to its right make up for it (optimal brain surgeon of a group): ||w_J M_JJ||^2 summed over its rows, J being its
columns. The sweep then makes up for all of them. Blocks that the plan names are taken as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..passes.statistics import InputStatistics, Need
from ..plan import Prune
from .base import PRUNES, Solved, Treated, prunes_of
from .factor import Factor, factorise
from .masking import calibrated, check_weights, magnitude_solved, output_error, planned_blocks, why_blind
from .select import block_sums, expanded, keep_lowest_out
from .sweep import Sweep, sweep


@dataclass(frozen=True)
class SparseGPT:
    """Mask chosen per block of columns on the compensated weights (unstructured, n:m), or once for blocks, rows and columns."""

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Need] = "gram"
    treats: ClassVar[frozenset[str]] = PRUNES
    every_pattern: ClassVar[bool] = True

    damp: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 128  # columns among which a mask is chosen at once
    reference: bool = False  # the official counts, ties and dead inputs

    def __post_init__(self) -> None:
        check_sweep("SparseGPT", self.damp, self.block)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError where weights are not finite or no damping helps."""
        inputs = calibrated("SparseGPT", inputs, "magnitude")
        prunes = prunes_of(self, treatments)
        check_weights(weights, inputs)
        if why := why_blind(inputs):
            return [magnitude_solved(w, prune, "layer", why) for w, prune in zip(weights, prunes, strict=True)]
        if inputs.gram is None:
            raise ConfigError('SparseGPT needs the gram of the inputs: collect statistics with needs="gram".')
        return self._solve(weights, inputs, prunes)

    def _solve(self, weights: Sequence[Tensor], inputs: InputStatistics, prunes: Sequence[Prune]) -> list[Solved]:
        gram = inputs.gram
        assert gram is not None  # noqa: S101  (solve has checked it)
        # the official code sets a dead input's power to 1 on its scale, 2 / N
        factor = factorise(gram, self.damp, fill=inputs.tokens / 2 if self.reference else None)
        solved: dict[int, Solved] = {}
        kinds = [_kind(prune) for prune in prunes]
        for kind in dict.fromkeys(kinds):  # one sweep, unless they differ
            chosen = [i for i, one in enumerate(kinds) if one == kind]
            known = [keep_groups(weights[i], prunes[i], factor) for i in chosen] if kind < 0 else None
            swept = sweep(
                [weights[i] for i in chosen],
                factor,
                [prunes[i] for i in chosen],
                self.block,
                reference=self.reference,
                keep=known,
            )
            for i, result in zip(chosen, swept, strict=True):
                unchanged = bool(result.keep.all()) and not self.reference
                solved[i] = finished(weights[i], result, factor, inputs, unchanged=unchanged)
        return [solved[i] for i in range(len(weights))]


def _kind(prune: Prune) -> int:
    """What one sweep can do together: n:m of one m, unstructured (0), or masks that are known before it (-1)."""
    if prune.nm:
        return prune.nm[1]
    return 0 if prune.pattern == "unstructured" else -1


def keep_groups(weight: Tensor, prune: Prune, factor: Factor) -> Tensor:
    """Which blocks, rows or columns stay, by the error that the loss of each alone would leave. (rows, columns) -> bool, same shape."""
    rows, columns = weight.shape
    if prune.kept:
        return planned_blocks(prune, weight)
    height, width = prune.block or {"row": (1, columns), "column": (rows, 1)}[prune.pattern]
    scores = block_sums(torch.zeros_like(weight), height, width)  # raises where they do not divide it
    for place, start in enumerate(range(0, columns, width)):
        here = slice(start, start + width)
        removed = (weight[:, here] * ~factor.dead[here]) @ factor.upper[here, here]
        scores[:, place] = removed.square().sum(1).reshape(-1, height).sum(1)
    return expanded(keep_lowest_out(scores, round(prune.sparsity * scores.numel())), height, width)


def check_sweep(solver: str, damp: float, block: int) -> None:
    """Raise ConfigError unless a sweep can be made with these settings of a solver."""
    if not (damp >= 0 and math.isfinite(damp)):
        raise ConfigError(f"{solver}.damp={damp}: give a share of the mean input power, 0 or more.")
    if block < 1:
        raise ConfigError(f"{solver}.block={block}: give a number of columns, 1 or more.")


def finished(weight: Tensor, swept: Sweep, factor: Factor, inputs: InputStatistics, *, unchanged: bool) -> Solved:
    """The outcome of a sweep over this weight. unchanged: nothing was asked of it."""
    if unchanged:
        return Solved(weight.clone(), swept.keep, 0.0, factor.notes)  # bit-identical, negative zeros too
    error = swept.damped_error - swept.damping_error
    # both are sums of squares; where little is left of their difference it is rounding, and the gram says it better
    if error < 1e-2 * swept.damped_error:
        error = output_error(weight - swept.weight, inputs) or 0.0
    return Solved(swept.weight, swept.keep, error, factor.notes)
