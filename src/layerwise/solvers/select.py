"""Which weights stay: exact counts, ties keep the lower index (row-major), plain tensors in and masks out.

Scores may be any float but NaN. Masks are bool, True = kept.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError

CHUNK = 1 << 16  # groups compared at once: what the pairs of a chunk take stays in the cache


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total` <= sum(sizes) over parts in proportion to their sizes, in integers that sum to it exactly.

    Cumulative rounding to the nearest: no part is off by one or more, and none gets more than its size.
    """
    whole = sum(sizes)
    shares, seen, given = [], 0, 0
    for size in sizes:
        seen += size
        upto = (2 * total * seen + whole) // (2 * whole) if whole else 0
        shares.append(upto - given)
        given = upto
    return shares


def keep_lowest_out(scores: Tensor, pruned: int) -> Tensor:
    """All but the `pruned` lowest of a whole matrix. (rows, columns) -> bool, same shape, in any memory layout."""
    if pruned == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    by_memory = scores.T if scores.stride(0) < scores.stride(1) else scores  # the limit is the same in any order
    limit = _order_statistics(by_memory.reshape(1, -1), torch.tensor([pruned], device=scores.device))
    keep = scores > limit
    if excess := int(scores.numel() - keep.sum()) - pruned:
        ties = (scores == limit).nonzero()[:excess]  # in row-major order
        keep[ties[:, 0], ties[:, 1]] = True
    return keep


def keep_per_row(scores: Tensor, pruned: Sequence[int]) -> Tensor:
    """All but the `pruned[i]` lowest of row i. scores: (rows, columns) -> bool (rows, columns)."""
    rows, columns = scores.shape
    counts = torch.tensor(pruned, device=scores.device)
    if columns == 0 or rows == 0 or not any(pruned):
        return torch.ones_like(scores, dtype=torch.bool)
    limits = _order_statistics(scores, counts).unsqueeze(1)
    keep = scores > limits
    excess = counts - (columns - keep.sum(1))  # how many of the ties at the limit must stay, negated
    for row in excess.nonzero().flatten().tolist():
        ties = (scores[row] == limits[row]).nonzero().flatten()
        keep[row, ties[: -int(excess[row])]] = True
    return keep


def _order_statistics(scores: Tensor, counts: Tensor) -> Tensor:
    """(rows,): the counts[i]-th lowest score of row i; -inf for a count of zero, so that only -inf ties with it.

    Partition and sort find the same values; on the CPU numpy's partition is 2 to 15 times faster than torch's kthvalue and sort.
    """
    limits = torch.full(scores.shape[:1], -torch.inf, device=scores.device, dtype=scores.dtype)
    if scores.device.type != "cpu":
        ordered = scores.sort(dim=1).values.gather(1, (counts - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
        return torch.where(counts > 0, ordered, limits)
    values = scores.detach().numpy()
    for count in set(counts.tolist()):  # after `spread` there are at most two
        if count:
            rows = counts == count
            some = values if rows.all() else values[rows.numpy()]
            limits[rows] = torch.from_numpy(np.partition(some, count - 1, axis=1)[:, count - 1])
    return limits


def keep_nm(scores: Tensor, n: int, m: int) -> Tensor:
    """The n highest of every m consecutive inputs. scores: (rows, columns) -> bool (rows, columns)."""
    rows, columns = scores.shape
    if columns % m:
        raise ShapeError(f"n:m: {columns} inputs do not split into groups of {m}. Leave this layer out of the plan.")
    groups = scores.reshape(rows, columns // m, m)
    if m > 16:  # the number of comparisons below grows with m * m
        flat = groups.reshape(-1, m)
        return keep_per_row(flat, [m - n] * len(flat)).reshape(rows, columns)
    return keep_n_of(groups.flatten(0, 1).T, n).T.reshape(rows, columns)


def keep_n_of(scores: Tensor, n: int) -> Tensor:
    """The n highest of each column. scores: (m, groups) -> bool (m, groups); ties keep the lower index.

    Every pair is compared once and a small matrix product counts how many beat each: a handful of operations on whole tensors,
    where sorting many tiny groups is slow.
    """
    m, groups = scores.shape
    first, second, count, losses = _pairs(m, scores.device)
    keep = torch.empty(m, groups, dtype=torch.bool, device=scores.device)
    for start in range(0, groups, CHUNK):
        here = slice(start, start + CHUNK)
        some = scores[:, here].contiguous()
        first_stays = (some[first] >= some[second]).float()
        torch.lt(torch.addmm(losses, count, first_stays), n - 0.5, out=keep[:, here])
    return keep


@functools.lru_cache(maxsize=32)
def _pairs(m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs first < second of m, and what turns "first stays" (pairs, groups) into how many beat each: count @ it + losses."""
    first, second = torch.triu_indices(m, m, 1, device=device)
    pairs = torch.arange(len(first), device=device)
    count = torch.zeros(m, len(first), device=device)
    count[second, pairs], count[first, pairs] = 1.0, -1.0  # a pair won by its first member is lost by its second
    losses = torch.arange(m - 1, -1, -1, device=device, dtype=torch.float32).unsqueeze(1)
    return first, second, count, losses


def keep_blocks(scores: Tensor, sparsity: float, block_rows: int, block_columns: int) -> Tensor:
    """All but round(sparsity * blocks) whole blocks of lowest summed squared score. (rows, columns) -> bool, same shape."""
    totals = block_sums(scores.square(), block_rows, block_columns)
    return expanded(keep_lowest_out(totals, round(sparsity * totals.numel())), block_rows, block_columns)


def block_sums(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """(rows, columns) -> (block rows, block columns): the sum over each block. Raises ShapeError unless the blocks divide it."""
    rows, columns = values.shape
    if rows % block_rows or columns % block_columns:
        raise ShapeError(
            f"block({block_rows}x{block_columns}): a weight of {rows}x{columns} does not split into such blocks."
            " Leave this layer out of the plan."
        )
    grid = values.reshape(rows // block_rows, block_rows, columns // block_columns, block_columns)
    return grid.sum(dim=(1, 3))


def expanded(grid: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Each entry of a grid of blocks repeated over its block: (block rows, block columns) -> (rows, columns)."""
    return grid.repeat_interleave(block_rows, dim=0).repeat_interleave(block_columns, dim=1)
