"""SparseGPT's sweep over the columns, for all matrices that share an input at once.

Everything is held column by column, (columns, rows), so that a column of the weights is contiguous; the rows of all matrices lie side by
side. Work is left-looking at three levels (blocks, leaves, columns): each reads what was removed so far and writes only itself, the
upper two as matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError, SolveError
from ..plan import Prune
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
    weights: Sequence[Tensor], factor: Factor, prunes: Sequence[Prune], block: int, reference: bool
) -> list[Sweep]:
    """Prune matrices of (rows_i, columns) float32; their patterns are all unstructured, or all n:m with one m.

    Raises ShapeError where m does not divide the columns, SolveError if a new weight is not finite.
    """
    columns, rows = weights[0].shape[1], [weight.shape[0] for weight in weights]
    m = prunes[0].nm[1] if prunes[0].nm else 0
    if m and columns % m:
        raise ShapeError(f"n:m: {columns} inputs do not split into groups of {m}. Leave this layer out of the plan.")
    width = max(block - block % m, m) if m else block
    bounds = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    sizes = [stop - start for start, stop in bounds]
    counts = [spread(round(p.sparsity * w.numel()), sizes) for w, p in zip(weights, prunes, strict=True)]

    work = torch.cat(
        [weight.T for weight in weights], dim=1
    )  # (columns, all rows): old weights, block by block replaced
    if reference:
        work[factor.dead] = 0.0
    change = torch.empty_like(work)  # old - new
    keep = torch.empty_like(work, dtype=torch.bool)
    removed, pruned = (torch.empty(width, work.shape[1], device=work.device) for _ in range(2))
    power, live = factor.upper.diagonal(), ~factor.dead  # power: 1 / U_jj
    # scores rank dead inputs below all others, by magnitude among themselves
    scale = torch.where(live, power, power.max() * 1e-20).unsqueeze(1)
    damped = torch.zeros(work.shape[1], device=work.device)
    for number, (start, stop) in enumerate(bounds):
        here, size = slice(start, stop), stop - start
        part = _Block(work[here].clone(), removed[:size], pruned[:size], _inverse(factor.upper[here, here]))
        if start:
            part.current.addmm_(part.inverse.T, factor.upper[:start, here].T @ change[:start])
        part.inverse *= power[here].unsqueeze(1)  # now takes the weight removed, not that over U_jj
        if m:
            for at in range(0, size, m):
                part.catch_up(at, at + m)
                _choose_nm(
                    part.current[at : at + m], scale[here][at : at + m], prunes, rows, pruned[at : at + m], reference
                )
                part.columns(at, at + m)
        else:
            zeros = [count[number] for count in counts]
            _choose(part.current, scale[here], zeros, prunes, rows, pruned[:size], reference)
            for at in range(0, size, LEAF):
                part.catch_up(at, min(at + LEAF, size))
                part.columns(at, min(at + LEAF, size))
        part.current -= removed[:size]  # exactly zero where pruned
        torch.sub(work[here], part.current, out=change[here])
        work[here] = part.current
        torch.eq(pruned[:size], 0, out=keep[here])
        damped += (power[here].square() * live[here]) @ removed[:size].square()
    if not torch.isfinite(work.sum()) and not work.isfinite().all():
        raise SolveError("the compensated weights overflow float32. Raise the damping, or use the solver wanda.")
    damping = (factor.added * live) @ change.square_()
    return [
        Sweep(new.T.contiguous(), kept.T.contiguous(), float(total.sum()), float(part.sum()))
        for new, kept, total, part in zip(
            torch.split(work, rows, dim=1),
            torch.split(keep, rows, dim=1),
            torch.split(damped, rows),
            torch.split(damping, rows),
            strict=True,
        )
    ]


@dataclass
class _Block:
    """The columns whose mask is chosen at once, (size, all rows) each.

    current: weights, compensated for everything removed so far as far as the leaf has come. removed: the weight that stood there when
    its turn came, where pruned; else 0. pruned: 1 where pruned, else 0 (multiplies faster than a bool selects).
    inverse: (size, size) upper triangular U of this block, rows scaled to a diagonal of one.
    """

    current: Tensor
    removed: Tensor
    pruned: Tensor
    inverse: Tensor

    def catch_up(self, start: int, stop: int) -> None:
        """Columns start:stop take in what was removed from the columns of the block before them."""
        if start:
            self.current[start:stop].addmm_(self.inverse[:start, start:stop].T, self.removed[:start], alpha=-1)

    def columns(self, start: int, stop: int) -> None:
        """One column after the other: take in what was removed since `start`, then remove its own pruned weights."""
        leaf = slice(start, stop)
        before, factors = self.removed[leaf].T, self.inverse[leaf, leaf].T.contiguous()
        for column, (current, pruned, removed, factor) in enumerate(
            zip(
                self.current[leaf].unbind(),
                self.pruned[leaf].unbind(),
                self.removed[leaf].unbind(),
                factors.unbind(),
                strict=True,
            )
        ):
            if column:
                current.addmv_(before[:, :column], factor[:column], alpha=-1)
            torch.mul(current, pruned, out=removed)


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
