"""All masks that a group of an ARMOR core can have, and what each would need: small inverses, one set for every group of columns."""

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """Of Q, (column blocks, b, b), in groups of m. subsets: bool (masks, m). inverse: (column blocks, groups, masks, m, m), (Q_TT)^-1
    in the rows and columns of T, zero elsewhere. coupling: (column blocks, groups, groups, m, m), the part of Q between two groups."""

    subsets: Tensor
    inverse: Tensor
    coupling: Tensor

    @property
    def within(self) -> Tensor:
        """(column blocks, groups, m, m): the part of Q in each group."""
        return self.coupling.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)


def masks_of(curvature: Tensor, n: int, m: int) -> Masks:
    """curvature: Q. The inverses are damped at the rounding of the dtype, relative to Q: no scale of weight or inputs matters."""
    blocks, block, _ = curvature.shape
    coupling = curvature.view(blocks, block // m, m, block // m, m).transpose(2, 3)
    subsets = subsets_of(n, m).to(curvature.device)
    masks = Masks(subsets, curvature, coupling)
    mean = masks.within.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, 1.0)[..., None, None, None]
    both = subsets.unsqueeze(-1) & subsets.unsqueeze(-2)
    eye = torch.eye(m, dtype=curvature.dtype, device=curvature.device)
    damp = 10 * torch.finfo(curvature.dtype).eps
    # what is not kept gets a diagonal of its own, so that the inverse falls apart into both
    whole = torch.where(both, masks.within.unsqueeze(2), 0.0) + mean * (
        damp * eye + torch.diag_embed((~subsets).to(eye))
    )
    inverse, failed = torch.linalg.inv_ex(whole)
    sound = (failed == 0) & inverse.isfinite().all(-1).all(-1)
    return Masks(subsets, torch.where(both & sound[..., None, None], inverse, 0.0), coupling)


def subsets_of(n: int, m: int) -> Tensor:
    """bool (masks, m): every way to keep n of m, in lexical order."""
    subsets = torch.zeros(math.comb(m, n), m, dtype=torch.bool)
    for index, chosen in enumerate(combinations(range(m), n)):
        subsets[index, list(chosen)] = True
    return subsets
