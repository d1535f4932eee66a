"""Fitting scale and zero to groups of weights, and taking codes. Plain tensors; each group is one row of (groups, size).

Scales are rounded to the dtype that they will be stored in before any code is taken, so that codes fit the scales that are stored.
Sources: shift, Quanto >= 0.2.3 (and its symmetric grid, absmax over 2^(bits-1) - 1); integer, GPTQ (github.com/IST-DASLab/gptq).
Departures: D1 a symmetric grid reaches from -M to M also where a group has no negative weight (the official code keeps 0 there and
clips everything above half the range). D2 a group of one value is exact (official: its range is widened to zero and rounded).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..treatments import GroupBits

GridName = Literal["integer", "shift"]
ScaleName = Literal["auto", "float16", "bfloat16", "float32"]
SHRINKS = tuple(1 - step / 100 for step in range(80))  # of the range: 1, 0.99, ..., 0.21
EXPONENT = 2.4  # of the error that the search minimises
CHUNK = 1 << 19  # weights whose errors are summed at once: bounds the memory, and is long enough for its operations


@dataclass(frozen=True)
class Grid:
    """How groups become codes: the number of codes, where the zero may be, how scales are stored, and whether ranges are searched.

    bits: 2 to 8. shift: the zero is any number; else a whole code. symmetric: zero at 2^(bits - 1). mse: search the range.
    """

    bits: int
    symmetric: bool = False
    shift: bool = False
    mse: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1


def check_grid(solver: str, grid: str, scales: str) -> None:
    """Raise ConfigError unless these words of a solver's settings are known."""
    if grid not in ("integer", "shift"):
        raise ConfigError(f'{solver}.grid="{grid}": give "integer" (zero is a code) or "shift" (zero is any number).')
    if scales not in ("auto", "float16", "bfloat16", "float32"):
        raise ConfigError(f'{solver}.scales="{scales}": give auto, float16, bfloat16 or float32, the dtype of scales.')


def scale_dtype_of(scales: ScaleName) -> torch.dtype:
    """The dtype behind the word; auto without a model at hand is float16, which float32 holds exactly."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(scales, torch.float16)


def bits_of_group(scales: ScaleName, *, shift: bool = False) -> GroupBits:
    """What is stored of each group with scales of this word; auto has 16 bits whatever the model."""
    return GroupBits(torch.finfo(scale_dtype_of(scales)).bits, shift)


def fit(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(scale, zero), each (groups,) float32, of groups (groups, size) float32; the same for each group whatever stands beside it."""
    low, high = groups.amin(1), groups.amax(1)
    scale, zero = _of_range(low, high, grid)
    if grid.mse:
        scale, zero = _searched(groups, low, high, scale, zero, grid)
    return _degenerate(low, high, scale, zero, grid)


def steps_of(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Whole codes as float32, (groups, size). Round half to even, as torch does.

    Where the zero is whole this is clamp(round(w / scale), -zero, top - zero) + zero.
    """
    scaled = groups / scale.unsqueeze(1)
    if grid.shift and not grid.symmetric:
        return scaled.add_(zero.unsqueeze(1)).round_().clamp_(0, grid.top)
    return scaled.round_().add_(zero.unsqueeze(1)).clamp_(0, grid.top)


def _of_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid that just covers low to high; a range without extent gives a scale of 1."""
    if grid.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        whole = (grid.top - 1) / 2 if grid.shift else grid.top / 2  # Quanto's has no code below -absmax
        scale = stored(reach / whole, grid.scale_dtype)
        return scale, torch.full_like(scale, 2.0 ** (grid.bits - 1))
    if grid.shift:
        scale = stored((high - low) / grid.top, grid.scale_dtype)
        return scale, shift_zero(low, scale, grid.scale_dtype)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = stored((high - low) / grid.top, grid.scale_dtype)
    return scale, torch.round(-low / scale).clamp_(0, grid.top).add_(0.0)  # no negative zero


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored, float32; one that would be stored as zero or infinity is the nearest that is not, 0 becomes 1.

    Subnormal ones stay: 8 bits over weights within 0.008 need them in float16, and codes are taken on the rounded scale.
    """
    limits = torch.finfo(dtype)
    kept = scale.clamp(limits.smallest_normal * limits.eps, limits.max).to(dtype).float()
    return torch.where(scale > 0, kept, torch.ones_like(scale))


def shift_zero(low: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The zero of a grid whose code 0 means `low`, with `low` stored in this dtype."""
    return -low.to(dtype).float() / scale


def _degenerate(low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Groups of one value: the step is that value, so that they are exact (a float shift is so anyway)."""
    if grid.shift and not grid.symmetric:
        return scale, zero
    single = (low == high) & (low != 0)
    if not single.any():
        return scale, zero
    scale = torch.where(single, stored(low.abs(), grid.scale_dtype), scale)
    if not grid.symmetric:
        zero = torch.where(single, (low < 0).float(), zero)
    return scale, zero


def _searched(
    groups: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The shrunk range of least sum |w' - w|^2.4, group by group; the widest of equals. A chunk of groups at a time."""
    scale, zero = scale.clone(), zero.clone()
    height = max(CHUNK // groups.shape[1], 1)
    for start in range(0, len(groups), height):
        here = slice(start, start + height)
        some = groups[here]
        best = torch.full_like(scale[here], torch.inf)
        for shrink in SHRINKS:
            tried, at = _of_range(low[here] * shrink, high[here] * shrink, grid)
            off = steps_of(some, tried, at, grid).sub_(at.unsqueeze(1)).mul_(tried.unsqueeze(1)).sub_(some)
            error = off.abs_().pow_(EXPONENT).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale[here] = torch.where(better, tried, scale[here])
            zero[here] = torch.where(better, at, zero[here])
    return scale, zero
