"""ARMOR's discrete step: groups of m core entries get another mask and the values that go with it, the best of all masks.

In block (i, j), for a group with entries s in row r of the core, G half the gradient there and Q its m x m part of Q_j:
f = G - P_rr Q s is half the gradient with the group zeroed, and keeping the entries T with values v changes the loss, from there,
by 2 f.v + P_rr v.Q v, least at v_T = -(Q_TT)^-1 f_T / P_rr. Several groups of a block are taken one after the other: a change of
one moves the gradient of another by P_rr' times the part of Q between them, so that only the chosen groups are ever looked at.
"""

from typing import Literal

import torch
from torch import Tensor

from .armor_gains import gains
from .armor_masks import Masks, masks_of
from .armor_state import State, Target

Select = Literal["gain", "gradient", "uniform"]
SHARE = 32  # no more than one in so many groups of a block in one step: the next one knows the changes better


def remask(
    target: Target,
    state: State,
    gradient: Tensor,
    curvature: tuple[Tensor, Tensor],
    draws: int,
    select: Select,
    generator: torch.Generator,
) -> None:
    """Draw up to `draws` groups of every block and give each its best mask and values, in place. gradient: half that of the core."""
    masks = masks_of(curvature[1], target.n, target.m)
    draws = min(draws, max(1, target.block**2 // target.m // SHARE))
    if select == "gain":
        groups = gains(state, gradient, curvature[0], masks).topk(draws, -1).indices
    else:
        groups = draw(gradient, target, draws, select, generator)
    apply(state, gradient, curvature[0], masks, groups)


def draw(gradient: Tensor, target: Target, draws: int, select: Select, generator: torch.Generator) -> Tensor:
    """(row blocks, column blocks, draws): groups of each block by number, row-major, in proportion to the L1 norm of their gradients.

    Uniform numbers from the CPU, spread evenly over [0, 1), are looked up in the cumulated norms, so that all devices draw alike. A
    group may be drawn twice. Uniformly where all norms of a block are zero.
    """
    rows, columns = gradient.shape
    block, m = target.block, target.m
    high, wide = rows // block, columns // block
    count = block * block // m
    norms = gradient.abs().view(high, block, wide, block // m, m).sum(-1).transpose(1, 2).reshape(high, wide, count)
    norms = norms / norms.amax(-1, keepdim=True)
    if select == "uniform":
        norms = torch.ones_like(norms)
    norms = torch.where(norms.isfinite().all(-1, keepdim=True), norms, 1.0)
    upto = norms.cumsum(-1)
    places = torch.rand(high, wide, draws, generator=generator, dtype=torch.float64)
    places = ((places + torch.arange(draws)) / draws).to(upto)
    return torch.searchsorted(upto, places * upto[..., -1:], right=True).clamp_max_(count - 1)


def apply(state: State, gradient: Tensor, left: Tensor, masks: Masks, groups: Tensor) -> None:
    """Give these groups their best mask and values, those of one block in the order given. groups: (row blocks, column blocks, draws).

    gradient: half that of the core. left: P, (row blocks, b, b).
    """
    columns, block = state.core.shape[1], left.shape[1]
    m = masks.subsets.shape[1]
    per_row = block // m
    high, wide, draws = groups.shape
    i = torch.arange(high, device=groups.device).view(high, 1, 1)
    j = torch.arange(wide, device=groups.device).view(1, wide, 1)
    row, column = groups // per_row, groups % per_row
    place = (i * block + row) * (columns // m) + j * per_row + column  # among all groups of the core
    core, keep = state.core.view(-1, m), state.keep.view(-1, m)
    values, kept, slopes = core[place], keep[place], gradient.view(-1, m)[place]  # (high, wide, draws, m)
    again = (groups.unsqueeze(-1) == groups.unsqueeze(-2)).tril(-1).any(-1)  # drawn before: the first does it
    for t in range(draws):
        r, c = row[..., t], column[..., t]
        own = left[i[..., 0], r, r]
        couple = masks.coupling[j, c.unsqueeze(-1), column]  # (high, wide, draws, m, m): how each draw sees this one
        within = couple[:, :, t]
        new, chosen = _best(
            values[:, :, t], slopes[:, :, t], own, within, masks, masks.inverse[j[..., 0], c], again[..., t]
        )
        change = new - values[:, :, t]
        near = left[i, r.unsqueeze(-1), row]
        slopes += near.unsqueeze(-1) * (change[:, :, None, None, :] @ couple).squeeze(-2)
        values[:, :, t] = new
        kept[:, :, t] = torch.where(chosen.unsqueeze(-1) >= 0, masks.subsets[chosen.clamp_min(0)], kept[:, :, t])
    done = ~again
    core[place[done]], keep[place[done]] = values[done], kept[done]


def _best(
    values: Tensor, slope: Tensor, own: Tensor, within: Tensor, masks: Masks, inverse: Tensor, again: Tensor
) -> tuple[Tensor, Tensor]:
    """New values (..., m) and the number of their mask (-1: left alone) of one group in each block.

    The change of the loss is computed from the values that will be stored, damping and all, so that none is taken for the worse.
    """
    own = own.unsqueeze(-1)
    zeroed = slope - own * _times(within, values)
    flat = torch.where(own > 0, 1 / own, 0.0)
    options = -flat.unsqueeze(-1) * _times(inverse, zeroed.unsqueeze(-2))  # (..., masks, m)
    change = _change(options, zeroed.unsqueeze(-2), own.unsqueeze(-1), within.unsqueeze(-3))
    least, chosen = change.min(-1)
    present = _change(values, zeroed, own, within)
    worse = again | ~(least < present)
    new = options.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, values.shape[-1])).squeeze(-2)
    return torch.where(worse.unsqueeze(-1), values, new), torch.where(worse, -1, chosen)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _change(values: Tensor, zeroed: Tensor, own: Tensor, within: Tensor) -> Tensor:
    return 2 * (zeroed * values).sum(-1) + own.squeeze(-1) * (values * _times(within, values)).sum(-1)
