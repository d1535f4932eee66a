"""The sweep over the columns of SparseGPT and GPTQ, for all matrices that share an input at once.

Everything is held column by column, (columns, rows), so that a column of the weights is contiguous; the rows of all matrices lie side by
side. Work is left-looking at three levels (blocks, leaves, columns): each reads what was removed so far and writes only itself, the
upper two as matrix products. A column loses its pruned weights, or what lies between its weights and their codes, or both.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError, SolveError
from ..plan import Prune
from .column_grids import ColumnGrids
from .factor import Factor
from .masking import reference_prune
from .select import keep_lowest_out, keep_n_of, spread

LEAF = 16  # columns handled one by one between two matrix products


@dataclass
class Sweep:
    """weight, keep: (rows, columns) of one matrix.

    damped_error: the change weighed by the damped gram, which is the sum of removed^2 / U_jj^2 exactly. damping_error: the damping's
    share in it. Dead inputs count in neither.
    """

    weight: Tensor
    keep: Tensor
    damped_error: float
    damping_error: float


def sweep(
    weights: Sequence[Tensor],
    factor: Factor,
    prunes: Sequence[Prune],
    block: int,
    *,
    reference: bool = False,
    grids: ColumnGrids | None = None,
    keep: Sequence[Tensor] | None = None,
) -> list[Sweep]:
    """Prune matrices of (rows_i, columns) float32; their patterns are all unstructured, or all n:m with one m.

    keep: masks that are known, one for each matrix; then nothing is chosen. With `grids`, what stays goes to its code as its column has its
    turn; the grids keep the codes.
    Raises ShapeError where m does not divide the columns, SolveError if a new weight is not finite.
    """
    columns, rows = weights[0].shape[1], [weight.shape[0] for weight in weights]
    m = prunes[0].nm[1] if prunes[0].nm else 0
    if m and columns % m:
        raise ShapeError(f"n:m: {columns} inputs do not split into groups of {m}. Leave this layer out of the plan.")
    unit = math.lcm(m or 1, grids.unit if grids else 1)  # groups never straddle blocks
    width = max(block - block % unit, unit)
    bounds = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    sizes = [stop - start for start, stop in bounds]
    counts = [spread(round(p.sparsity * w.numel()), sizes) for w, p in zip(weights, prunes, strict=True)]

    work = torch.cat(
        [weight.T for weight in weights], dim=1
    )  # (columns, all rows): old weights, block by block replaced
    if reference:
        work[factor.dead] = 0.0
    change = torch.empty_like(work)  # old - new
    kept = torch.empty_like(work, dtype=torch.bool)
    removed, pruned, steps = (torch.zeros(width, work.shape[1], device=work.device) for _ in range(3))
    power, live = factor.upper.diagonal(), ~factor.dead  # power: 1 / U_jj
    # scores rank dead inputs below all others, by magnitude among themselves
    scale = torch.where(live, power, power.max() * 1e-20).unsqueeze(1)
    damped = torch.zeros(work.shape[1], device=work.device)
    choice = _Choice(prunes, rows, m, reference, torch.cat([one.T for one in keep], dim=1) if keep else None)
    for number, (start, stop) in enumerate(bounds):
        here, size = slice(start, stop), stop - start
        inverse = _inverse(factor.upper[here, here])
        part = _Block(work[here].clone(), removed[:size], pruned[:size], steps[:size], inverse, [0] * size)
        if start:
            part.current.addmm_(part.inverse.T, factor.upper[:start, here].T @ change[:start])
        part.inverse *= power[here].unsqueeze(1)  # now takes the weight removed, not that over U_jj
        _take_turns(part, scale[here], choice, [count[number] for count in counts], grids, start)
        # without grids exactly zero where pruned
        new = grids.take(start, stop, part.steps) if grids else part.current.sub_(part.removed)
        torch.sub(work[here], new, out=change[here])
        work[here] = new
        torch.eq(part.pruned, 0, out=kept[here])
        damped += (power[here].square() * live[here]) @ part.removed.square()
    if not torch.isfinite(work.sum()) and not work.isfinite().all():
        raise SolveError("the compensated weights overflow float32. Raise the damping, or use the solver wanda.")
    damping = (factor.added * live) @ change.square_()
    return [
        Sweep(new.T.contiguous(), stays.T.contiguous(), float(total.sum()), float(part.sum()))
        for new, stays, total, part in zip(
            torch.split(work, rows, dim=1),
            torch.split(kept, rows, dim=1),
            torch.split(damped, rows),
            torch.split(damping, rows),
            strict=True,
        )
    ]


@dataclass
class _Choice:
    """What says which weights go: a treatment per matrix, their rows, m of n:m or 0, whether the official rule is asked for, and masks
    that are known, (columns, all rows)."""

    prunes: Sequence[Prune]
    rows: list[int]
    m: int
    reference: bool
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        self.prunes_any = self.reference or any(prune.sparsity > 0 for prune in self.prunes)


@dataclass
class _Block:
    """The columns whose mask is chosen at once, (size, all rows) each.

    current: weights, compensated for what was removed as far as the sweep has come. removed: what each column lost when its turn came.
    pruned: 1 where pruned, else 0 (multiplies faster than a bool selects). steps: codes, counted from zero.
    inverse: (size, size) upper triangular U of this block, rows scaled to a diagonal of one.
    seen: (size,) for each column, how many columns of the block it has made up for.
    """

    current: Tensor
    removed: Tensor
    pruned: Tensor
    steps: Tensor
    inverse: Tensor
    seen: list[int]

    def catch_up(self, start: int, stop: int) -> None:
        """Columns start:stop take in what was removed from the columns of the block before them."""
        for seen, some in itertools.groupby(range(start, stop), self.seen.__getitem__):
            columns = list(some)
            if seen < start:
                late = slice(columns[0], columns[-1] + 1)
                self.current[late].addmm_(self.inverse[seen:start, late].T, self.removed[seen:start], alpha=-1)
        self.seen[start:stop] = [start] * (stop - start)

    def columns(self, start: int, stop: int) -> None:
        """One column after the other: take in what was removed since `start`, then remove its own pruned weights."""
        for (current, removed), pruned in zip(self._turns(start, stop), self.pruned[start:stop].unbind(), strict=True):
            torch.mul(current, pruned, out=removed)

    def coded_columns(self, start: int, stop: int, grids: ColumnGrids, first: int, masked: bool) -> None:
        """The same, where what stays goes to its code: what lies between is removed. first: the column that the block begins at."""
        lines = grids.lines[first + start : first + stop]
        chosen = zip(self.steps[start:stop].unbind(), self.pruned[start:stop].unbind(), lines, strict=True)
        for (current, removed), (step, pruned, (scale, low, high)) in zip(
            self._turns(start, stop), chosen, strict=True
        ):
            torch.div(current, scale, out=step).round_()
            torch.clamp(step, low, high, out=step)
            if masked:
                step.addcmul_(step, pruned, value=-1)
            torch.addcmul(current, step, scale, value=-1, out=removed)

    def _turns(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(current, removed) of each column, once it has taken in what the columns since `start` have lost."""
        leaf = slice(start, stop)
        before, factors = self.removed[leaf].T, self.inverse[leaf, leaf].T.contiguous()
        turns = zip(self.current[leaf].unbind(), self.removed[leaf].unbind(), factors.unbind(), strict=True)
        for column, (current, removed, factor) in enumerate(turns):
            if column:
                current.addmv_(before[:, :column], factor[:column], alpha=-1)
            yield current, removed


def _take_turns(
    part: _Block, scale: Tensor, choice: _Choice, zeros: Sequence[int], grids: ColumnGrids | None, first: int
) -> None:
    """All columns of a block: masks chosen, groups fitted, where they begin. zeros: of each matrix in this block, unstructured."""
    size, m = len(part.current), choice.m
    if choice.keep is not None:
        torch.logical_not(choice.keep[first : first + size], out=part.pruned)
    elif choice.prunes_any and not m:
        _choose(part.current, scale, zeros, choice.prunes, choice.rows, part.pruned, choice.reference)
    fits = {column - first for column in grids.starts(first, first + size)} if grids else set()
    for at, upto in itertools.pairwise(sorted({*range(0, size, m or LEAF), *fits, size})):
        if grids and at in fits:
            group = slice(at, at + grids.size)
            part.catch_up(group.start, group.stop)
            known = choice.prunes_any and not m  # of n:m the mask is chosen later
            grids.fit(first + at, part.current[group] * (1 - part.pruned[group]) if known else part.current[group])
        if choice.prunes_any and m and at % m == 0:
            group = slice(at, at + m)
            part.catch_up(group.start, group.stop)
            _choose_nm(
                part.current[group], scale[group], choice.prunes, choice.rows, part.pruned[group], choice.reference
            )
        part.catch_up(at, upto)
        if grids:
            part.coded_columns(at, upto, grids, first, choice.prunes_any)
        else:
            part.columns(at, upto)


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of one diagonal block of the factor: the same block of U."""
    eye = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def _choose(
    current: Tensor,
    scale: Tensor,
    zeros: Sequence[int],
    prunes: Sequence[Prune],
    rows: list[int],
    out: Tensor,
    reference: bool,
) -> None:
    """Each matrix's own count of lowest scores |w| / U_jj in this block of columns. `out`: 1 where pruned."""
    scores = torch.split(current.abs() * scale, rows, dim=1)
    for score, count, prune, target in zip(scores, zeros, prunes, torch.split(out, rows, dim=1), strict=True):
        by_row = score.T  # ties go by row, then column
        lowest = reference_prune(by_row, prune.sparsity) if reference else ~keep_lowest_out(by_row, count)
        target.copy_(lowest.T)


def _choose_nm(
    current: Tensor, scale: Tensor, prunes: Sequence[Prune], rows: list[int], out: Tensor, reference: bool
) -> None:
    """The m - n lowest scores of one group of m columns, row by row. current: (m, all rows)."""
    scores, kept = current.abs() * scale, [prune.nm[0] for prune in prunes if prune.nm]
    if not reference and len(set(kept)) == 1:
        out.copy_(keep_n_of(scores, kept[0]).logical_not_())
        return
    for score, n, target in zip(torch.split(scores, rows, dim=1), kept, torch.split(out, rows, dim=1), strict=True):
        if reference:
            lowest = score.T.topk(score.shape[0] - n, dim=1, largest=False).indices
            target.zero_().T.scatter_(1, lowest, 1.0)
        else:
            target.copy_(keep_n_of(score, n).logical_not_())
