"""Random factors for tests of what runs and stores them."""

import torch

from layerwise.solvers import Factors
from layerwise.solvers.select import keep_nm


def drawn(
    rows: int, columns: int, block: int, dtype: torch.dtype = torch.float32, n: int = 2, m: int = 4, seed: int = 0
) -> Factors:
    """Normal numbers in blocks of this side and a core of n:m."""
    stream = torch.Generator().manual_seed(seed)
    core = torch.randn(rows, columns, generator=stream)
    left, right = (torch.randn(size // block, block, block, generator=stream) for size in (rows, columns))
    keep = keep_nm(core.abs(), n, m)
    return Factors.of(left.to(dtype), (core * keep).to(dtype), keep, right.to(dtype), n, m)
