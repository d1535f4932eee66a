"""Which weights stay: exact counts, ties keep the lower index (row-major), plain tensors in and masks out.

Scores may be any float but NaN. Masks are bool, True = kept.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError


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
    """All but the `pruned` lowest of the whole tensor. scores: any shape -> bool of that shape."""
    return keep_per_row(scores.reshape(1, -1), [pruned]).reshape(scores.shape)


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
    return torch.stack(keep_n_of(groups.unbind(-1), n), dim=-1).reshape(rows, columns)


def keep_n_of(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """The n highest of len(scores), elementwise over tensors of one shape; bool masks in the same order.

    Counts for each how many beat it: a few comparisons of whole tensors, where sorting many tiny groups is slow.
    """
    ranks = [torch.zeros_like(score, dtype=torch.int8) for score in scores]
    for low, first in enumerate(scores):
        for high in range(low + 1, len(scores)):
            first_stays = first >= scores[high]  # a tie keeps the lower index
            ranks[high] += first_stays
            ranks[low] += ~first_stays
    return [rank < n for rank in ranks]


def keep_blocks(scores: Tensor, sparsity: float, block_rows: int, block_columns: int) -> Tensor:
    """All but round(sparsity * blocks) whole blocks of lowest summed squared score. (rows, columns) -> bool, same shape."""
    rows, columns = scores.shape
    if rows % block_rows or columns % block_columns:
        raise ShapeError(
            f"block({block_rows}x{block_columns}): a weight of {rows}x{columns} does not split into such blocks."
            " Leave this layer out of the plan."
        )
    grid = scores.reshape(rows // block_rows, block_rows, columns // block_columns, block_columns)
    totals = grid.square().sum(dim=(1, 3))
    keep = keep_lowest_out(totals, round(sparsity * totals.numel()))
    return keep.repeat_interleave(block_rows, dim=0).repeat_interleave(block_columns, dim=1)
