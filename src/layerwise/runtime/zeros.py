"""What the zeros of a matrix look like, found from the zeros themselves: whole rows, groups of rows, blocks, 2:4.

Which form of a matrix can be fast depends on nothing else, whoever pruned it and whatever the plan called it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ShapeError

HEIGHTS = (4, 8, 16, 32, 64, 128, 256)  # rows that share the inputs they read
BLOCKS = (64, 32, 16, 8)  # sides of square blocks that kernels for block-sparse rows take
SAME = 1.1  # a larger unit is as good as a smaller one while it stores no more than this times as much


@dataclass(frozen=True)
class Zeros:
    """Of one matrix (rows, columns).

    density: fraction that is not zero. kept_rows, kept_columns: indices (int64) of those with a weight. height: rows of a group that is
    stored with only those columns that one of its rows needs, and `gathered` what is then stored, over the matrix. block: side of square
    blocks stored whole, and `stored` the fraction then stored; None if no side divides both sizes. two_four: at most 2 of every 4
    consecutive inputs are not zero.
    """

    rows: int
    columns: int
    density: float
    kept_rows: Tensor
    kept_columns: Tensor
    height: int
    gathered: float
    block: int | None
    stored: float
    two_four: bool

    @property
    def narrower(self) -> bool:
        """Whether a whole row or column is zero."""
        return len(self.kept_rows) < self.rows or len(self.kept_columns) < self.columns

    def words(self) -> str:
        """For people: "25.0% kept, in blocks of 16 × 16"."""
        parts = [f"{self.density:.1%} kept"]
        gone = self.rows - len(self.kept_rows), self.columns - len(self.kept_columns)
        parts += [f"{count} {name} zero" for count, name in zip(gone, ("rows", "columns"), strict=True) if count]
        if self.block is not None and self.stored < SAME * self.density < 1:
            parts.append(f"blocks of {self.block} × {self.block}")
        elif self.gathered < SAME * self.density < 1:
            parts.append(f"groups of {self.height} rows")
        elif self.two_four and self.density > 0:
            parts.append("2:4")
        return ", ".join(parts)


def zeros_of(weight: Tensor) -> Zeros:
    """weight: (rows, columns), any dtype and device. Raises ShapeError for another number of dimensions."""
    if weight.ndim != 2:
        raise ShapeError(f"zeros_of: a matrix is needed, not a tensor of {tuple(weight.shape)}.")
    rows, columns = weight.shape
    kept = weight != 0
    height, gathered = _groups(kept)
    block, stored = _blocks(kept)
    return Zeros(
        rows=rows,
        columns=columns,
        density=_share(kept),
        kept_rows=kept.any(1).nonzero()[:, 0],
        kept_columns=kept.any(0).nonzero()[:, 0],
        height=height,
        gathered=gathered,
        block=block,
        stored=stored,
        two_four=keeps_two_of_four(weight),
    )


def keeps_two_of_four(weight: Tensor) -> bool:
    """Whether every aligned group of 4 consecutive inputs has at most 2 that are not zero; False if the inputs do not divide by 4.

    Converters do not look: one given a dense matrix loses half of it without a word (PyTorch's CUTLASS route).
    """
    rows, columns = weight.shape
    return columns % 4 == 0 and bool(((weight != 0).reshape(rows, columns // 4, 4).sum(-1) <= 2).all())


def needed_columns(kept: Tensor, height: int) -> Tensor:
    """(rows, columns) bool -> (groups, columns): which columns a group of `height` rows reads; the last group may be shorter."""
    rows, columns = kept.shape
    return F.pad(kept, (0, 0, 0, -rows % height)).reshape(-1, height, columns).any(1)


def _groups(kept: Tensor) -> tuple[int, float]:
    """The height that stores least, the largest of those that are as good; and the fraction stored."""
    found: list[tuple[int, float]] = []
    needed = kept
    done = 1
    for height in HEIGHTS:
        if found and height >= 2 * kept.shape[0]:
            break
        needed = needed_columns(needed, height // done)  # of a group: what its halves need
        done = height
        stored = int(torch.count_nonzero(needed)) * height / max(1, kept.numel())
        found.append((height, stored))
    least = min(share for _, share in found)
    return next((height, share) for height, share in reversed(found) if share <= SAME * least)


def _blocks(kept: Tensor) -> tuple[int | None, float]:
    """The same for square blocks that divide both sizes."""
    rows, columns = kept.shape
    found = [
        (side, _share(kept.reshape(rows // side, side, columns // side, side).any(3).any(1)))
        for side in BLOCKS
        if rows % side == 0 and columns % side == 0 and rows and columns
    ]
    if not found:
        return None, 1.0
    least = min(share for _, share in found)
    return next((side, share) for side, share in found if share <= SAME * least)


def _share(kept: Tensor) -> float:
    return int(torch.count_nonzero(kept)) / max(1, kept.numel())
