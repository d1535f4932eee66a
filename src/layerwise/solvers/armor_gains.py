"""What another mask would gain in every group of a core, exactly, so that the groups worth changing are known before any is changed.

The loss without a group's entries falls by f_T (Q_TT)^-1 f_T / P_rr when those of T come back: a product of all pairs f_a f_b (features)
with numbers that depend on the column group alone (`Masks.inverse`). In that form it is one batched matrix product for all rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .armor_masks import Masks
from .armor_state import State

CHUNK = {"cpu": 1 << 18}  # numbers in features at once: on a CPU they stay in the cache
LARGE = 1 << 26


def gains(state: State, gradient: Tensor, left: Tensor, masks: Masks) -> Tensor:
    """(row blocks, column blocks, groups of a block): how far the best mask lowers the loss from what it is, >= 0, row-major groups.

    gradient: half that of the core. left: P, (row blocks, b, b).
    """
    rows, columns = gradient.shape
    blocks, per_row, count, m, _ = masks.inverse.shape
    own = left.diagonal(dim1=-2, dim2=-1).reshape(-1)
    flat = torch.where(own > 0, 1 / own, 0.0)
    first, second = torch.triu_indices(m, m, device=gradient.device)
    twice = torch.where(first == second, 1.0, 2.0).to(gradient.dtype)
    weights = (masks.inverse[..., first, second] * twice).view(blocks * per_row, count, -1)
    within = masks.within.reshape(blocks * per_row, m, m)
    found = torch.empty(columns // m, rows, dtype=gradient.dtype, device=gradient.device)
    for here in _chunks(columns // m, rows * max(len(first), count), gradient.device):
        slope, core = (
            one[:, here.start * m : here.stop * m].T.contiguous().view(-1, m, rows) for one in (gradient, state.core)
        )
        moved = torch.bmm(within[here], core)
        zeroed = torch.addcmul(slope, moved, own, value=-1)
        best = torch.bmm(weights[here], zeroed[:, first].mul_(zeroed[:, second])).amax(1)
        present = (core * (moved.mul_(own) + 2 * zeroed)).sum(1)
        found[here] = torch.addcmul(present, best, flat)
    split = found.view(blocks, per_row, rows // left.shape[1], left.shape[1])
    return split.permute(2, 0, 3, 1).reshape(left.shape[0], blocks, -1).clamp_min_(0)


def _chunks(total: int, each: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK.get(device.type, LARGE) // each)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
