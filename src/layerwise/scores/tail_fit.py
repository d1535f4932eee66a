"""The exponent of a spectrum's tail: Hill's estimator (Hill 1975) and three ways to choose where the tail begins.

`mid`: at the median, as TempBalance (NeurIPS 2023) trains. `peak`: near the peak of the density, where the fit is closest, as AlphaPruning
(NeurIPS 2024) and FARMS (ICML 2025) prune. `full`: wherever the fit is closest (Clauset et al. 2009). Small: a heavy tail.

Departures from the official code: D1 it compares raw eigenvalues with the logarithm of the lower bound of `peak`, which depends on the
unit of the weights; "peak-reference" does so too, for published numbers. D2 zeros are left out of the spectrum (its logarithms fail on
them). D3 where no cut is left it answers 0, which would then be the smallest alpha of all; here that is an error. D4 distances are
evaluated for about MOST cuts, then for all in the neighbourhood of the best.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ScoreError
from .spectra import TINY

Fit = Literal["mid", "peak", "peak-reference", "full"]
FITS: tuple[Fit, ...] = ("mid", "peak", "peak-reference", "full")
BINS = 100  # of the histogram of log10(eigenvalue) whose fullest bin is the peak
MOST = 1000  # cuts whose distance is evaluated at first
POINTS = 4096  # of the tail at which it then is


@dataclass(frozen=True)
class TailFit:
    """A power law with density exponent `alpha` for the `tail` eigenvalues from `cut` on, out of `count`.

    distance: Kolmogorov-Smirnov, between that law and the tail.
    """

    alpha: float
    cut: float
    tail: int
    count: int
    distance: float


def fit_tail(eigenvalues: Tensor, fit: Fit = "peak") -> TailFit:
    """The tail of a spectrum: (N,) ascending, >= 0, any unit (a common factor cancels, but for "peak-reference").

    Eigenvalues below TINY times the largest are zeros and left out; "peak-reference" leaves out exact zeros alone. Raises ScoreError if
    fewer than two are left, one is not finite, or those of the tail are all equal.
    """
    if fit not in FITS:
        raise ConfigError(f'fit "{fit}": give one of {", ".join(FITS)}.')
    values = eigenvalues.double()
    if not values.isfinite().all():
        raise ScoreError("fit_tail: an eigenvalue is not finite.")
    least = 0.0 if fit == "peak-reference" or not values.numel() else TINY * float(values[-1])
    values = values[values > least]
    if values.numel() < 2:
        raise ScoreError(f"a tail needs two eigenvalues that are not zero, and there are {values.numel()}.")
    alphas = hill(values)
    best = len(values) // 2 if fit == "mid" else _closest(values, alphas, _candidates(values, alphas, fit))
    alpha = float(alphas[best])
    if not math.isfinite(alpha):
        raise ScoreError(f"the {len(values) - best} largest eigenvalues are equal: they have no tail.")
    distance = float(_distances(values, alphas, torch.tensor([best], device=values.device)))
    return TailFit(alpha, float(values[best]), len(values) - best, len(values), distance)


def hill(values: Tensor) -> Tensor:
    """(N,) alpha for the tail from each index on: 1 + n / (sum of ln e[j], j >= i, - n ln e[i]), n = N - i; values > 0, ascending.

    The cut's own logarithm, 0, counts in n, as in the official code; Hill's k leaves it out. Infinite where all of the tail are equal.
    """
    logs = values.double().log()
    counts = torch.arange(len(logs), 0, -1, dtype=torch.float64, device=logs.device)
    # of differences to the largest: the sums of a short tail would drown in those of the whole
    drops = logs - logs[-1]
    sums = drops.flip(0).cumsum(0).flip(0) - counts * drops
    return 1 + counts / sums.clamp(min=0)


def _candidates(values: Tensor, alphas: Tensor, fit: Fit) -> Tensor:
    """Indices where the tail may begin. Raises ScoreError if there is none."""
    allowed = alphas.isfinite()
    allowed[-1] = False
    if fit != "full":
        peak = _peak(values)
        lower = math.log10(0.95 * peak) if fit == "peak-reference" else 0.95 * peak
        allowed &= (values >= lower) & (values <= 1.5 * peak)
    found = allowed.nonzero().flatten()
    if not len(found):
        raise ScoreError("no eigenvalue near the peak of the spectrum can begin a tail.")
    return found


def _peak(values: Tensor) -> float:
    """The left edge of the fullest of BINS bins of log10(e), the first of equals."""
    logs = values.log10()
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs.cpu(), BINS, low, high) if high > low else torch.ones(1)
    return math.pow(10, low + int(counts.argmax()) * (high - low) / BINS)


def _closest(values: Tensor, alphas: Tensor, candidates: Tensor) -> int:
    """The candidate whose law is closest to its tail, the first of equals; see D4."""
    stride = math.ceil(len(candidates) / MOST)
    rough = _distances(values, alphas, candidates[::stride], POINTS)
    if stride == 1 and len(values) <= POINTS:
        return int(candidates[int(rough.argmin())])
    middle = int(rough.argmin()) * stride
    near = candidates[max(0, middle - stride) : middle + stride + 1]
    return int(near[int(_distances(values, alphas, near).argmin())])


def _distances(values: Tensor, alphas: Tensor, cuts: Tensor, points: int | None = None) -> Tensor:
    """For each cut i: max over j >= i of |1 - (e[j]/e[i])^(1-alpha_i) - (j-i)/n|, (j-i)/n being the empirical CDF.

    points: where a tail is longer, it is looked at in so many places, evenly spaced; the distance is then short by 1/points at most.
    """
    logs, count = values.log(), len(values)
    size = count if points is None else min(points, count)
    grid = torch.linspace(0, 1, size, dtype=torch.float64, device=values.device)
    worst = []
    for some in torch.split(cuts, max(1, (1 << 22) // size)):
        i = some[:, None]
        if size == count:
            places = torch.arange(count, device=values.device).expand(len(some), count).clamp(min=i)
        else:
            places = i + (grid * (count - 1 - i)).round().long()
        law = 1 - ((1 - alphas[i]) * (logs[places] - logs[i])).exp()
        worst.append((law - (places - i) / (count - i)).abs().amax(1))
    return torch.cat(worst)
