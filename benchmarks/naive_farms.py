"""The recipe for a layer's exponent as the papers give it: the singular values of every window, every cut by itself. What is timed against.

Plain torch, nothing of layerwise's. The search for a cut compares like the official code but with the bound that does not depend on the
unit of the weights, so that both sides do the same.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Windows of `rows` x `rows`, `count` along each side."""

    rows: int
    count: int

    def corners(self, weight: Tensor) -> tuple[int, list[tuple[int, int]]]:
        """Side of a window, and the upper left corner of each."""
        side = min(self.rows, *weight.shape)
        starts = []
        for length in weight.shape:
            step = max(1, (length - side) // (self.count - 1))
            number = min(self.count, max(1, (length - side) // step + 1))
            starts.append([min(index * step, length - side) for index in range(number)])
        return side, [(top, left) for top in starts[0] for left in starts[1]]


@dataclass(frozen=True)
class Naive:
    """seconds: spectrum and fit. windows, cuts: how many there are; measured: how many windows were, the rest being extrapolated."""

    alpha: float
    seconds: float
    windows: int
    cuts: int
    measured: int


def naive(weight: Tensor, layout: Layout, fit: str, most: int | None = None) -> Naive:
    """Of a float32 matrix. most: time so many windows and cuts only, and count the others as long; alpha is then theirs alone."""
    side, corners = layout.corners(weight)
    some = corners if most is None else corners[:: math.ceil(len(corners) / most)]
    started = time.process_time()
    windows = [weight[top : top + side, left : left + side] for top, left in some]
    values = torch.cat([torch.linalg.svdvals(window).square() for window in windows]).sort().values
    spectrum = (time.process_time() - started) * len(corners) / len(some)
    started = time.process_time()
    if fit == "mid":
        alpha, cuts = _alpha(values.log(), len(values) // 2), 1
    else:
        alpha, cuts = _peak(values)
    seconds = (time.process_time() - started) * (len(corners) / len(some)) ** 2  # more cuts, each over more eigenvalues
    return Naive(alpha, spectrum + seconds, len(corners), cuts, len(some))


def _peak(values: Tensor) -> tuple[float, int]:
    logs = values.log()
    low, high = float(values[0].log10()), float(values[-1].log10())
    fullest = int(torch.histc(values.log10(), 100, low, high).argmax())
    peak = 10 ** (low + fullest * (high - low) / 100)
    best, least, cuts = math.nan, math.inf, 0
    for i in range(len(values) - 1):
        if not 0.95 * peak <= values[i] <= 1.5 * peak:
            continue
        alpha, n = _alpha(logs, i), len(values) - i
        law = 1 - (values[i:] / values[i]) ** (1 - alpha)
        distance = float((law - torch.arange(n) / n).abs().max())
        cuts += 1
        if distance < least:
            best, least = alpha, distance
    return best, cuts


def _alpha(logs: Tensor, i: int) -> float:
    n = len(logs) - i
    return 1 + n / float((logs[i:] - logs[i]).sum())
