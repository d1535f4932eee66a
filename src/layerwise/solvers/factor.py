"""One Cholesky factor of the damped second moments of the inputs, shared by all matrices that see them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError
from ..passes.statistics import widest

RAISES = 5  # times the damping is multiplied by ten before giving up, unless asked otherwise


class FactorError(SolveError):
    """No damping that was tried makes the second moments a sum of squares."""


@dataclass
class Factor:
    """upper: (columns, columns) upper triangular M with M M^T = gram + diag(added), float32.

    added: (columns,) damping, and for a dead input the fill that stands in for its missing power.
    dead: bool (columns,), inputs that were zero on every token. notes: one sentence if the damping was raised.
    """

    upper: Tensor
    added: Tensor
    dead: Tensor
    notes: tuple[str, ...] = ()


def factorise(gram: Tensor, damp: float, fill: float | None = None, raises: int = RAISES) -> Factor:
    """Factor gram + damp * mean(diagonal) * I, dead inputs filled first. gram: (columns, columns), symmetric.

    fill: the diagonal of dead inputs; None takes the mean of the live ones, so that the result scales with the gram and dead inputs
    change nothing. A failure in float32 is tried again in float64, then with 10 times the damping, up to `raises` times.
    Raises SolveError if the gram is not finite, FactorError if no damping helps.
    """
    power = gram.diagonal()
    if not torch.isfinite(gram.sum()) and (bad := gram.numel() - int(gram.isfinite().sum())):
        raise SolveError(
            f"the inputs' second moments have {bad} non-finite values. Look for overflow in the layers before."
        )
    dead = power == 0
    filled = torch.where(dead, power[~dead].mean() if fill is None else fill, power)
    share = damp
    for _ in range(raises + 1):
        added = filled - power + share * filled.mean()
        upper = _upper_cholesky(gram, power + added)
        if upper is not None:
            note = f"damping raised from {damp:g} to {share:g} of the mean input power: the factorisation had failed"
            return Factor(upper, added, dead, (note,) if share != damp else ())
        share = share * 10 or 0.01
    raise FactorError(
        f"the inputs' second moments could not be factorised even with damping {share / 10:g}: they are no sum of squares."
        " Use more calibration tokens, or the solver wanda."
    )


def _upper_cholesky(gram: Tensor, diagonal: Tensor) -> Tensor | None:
    """Upper triangular M with M M^T = gram with this diagonal, in float32; None if it is not positive definite.

    Turned around on both axes, the usual lower factor is the upper one that elimination from the last column needs.
    """
    turned = gram.flip(0, 1)
    turned.diagonal().copy_(diagonal.flip(0))
    for dtype in dict.fromkeys((torch.float32, widest(gram.device))):  # each once
        lower, failed = torch.linalg.cholesky_ex(turned.to(dtype))
        if not failed and torch.isfinite(lower.diagonal()).all():
            upper: Tensor = lower.flip(0, 1).float()
            return upper
    return None
