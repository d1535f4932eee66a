"""A quantising solver of a few lines, for tests of what calls one: plain rounding on the range of each group."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from layerwise.solvers.base import Solved


@dataclass(frozen=True)
class Rounding:
    """w -> the nearest of 2^bits points from the least to the largest weight of the group."""

    name: ClassVar[str] = "rounding"
    needs: ClassVar[str] = "none"
    every_pattern: ClassVar[bool] = False

    def solve(self, weights, inputs, treatments, generators):
        solved = []
        for weight, treatment in zip(weights, treatments, strict=True):
            groups = weight.reshape(-1, treatment.group or weight.shape[1])
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = ((high - low) / (2**treatment.bits - 1)).clamp(min=1e-12)
            rounded = ((groups - low) / step).round() * step + low
            solved.append(Solved(rounded.reshape(weight.shape), torch.ones_like(weight, dtype=torch.bool)))
        return solved
