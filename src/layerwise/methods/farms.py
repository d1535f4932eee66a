"""FARMS: one sparsity per block, lower where spectra of windows of its weights have heavy tails (ICML 2025).

AlphaPruning with another spectrum: pooled over windows of one ratio of columns to rows, so that the shape of a matrix no longer moves its
alpha. Weights alone: no data. Departures from the official code: D1 what exceeds the cap is taken by the other blocks (it clamps and
misses the budget; excess="clamp" does so too). D2 the cut is searched between 0.95 and 1.5 times the peak (it takes the logarithm of the
lower bound; fit="peak-reference"). D3 a matrix that no window fits into is taken whole, and a layer without a tail is left out of its
block's mean, both noted (negative starts cut a smaller window in silence; the list of layers shifts). D4 blocks are told apart by name (it
divides the list of layers by their number). D5 one window along a side is the middle one (it divides by zero). Fused weights (qkv, gate
and up) are one matrix, as they are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import ConfigError
from ..plan import Plan
from ..scores import Fit, Look, Windows
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found
from .heavy_tails import Excess, Per, check_settings, looked_at, plan_by_tails


@dataclass(frozen=True)
class FARMS:
    """Defaults: the official scripts for LLaMA-7B at 70 % with Wanda. For image models: per="layer", fit="mid", spread=0.2."""

    name: ClassVar[str] = "farms"
    summary: ClassVar[str] = "one sparsity per block, lower where windows of its weights have heavy-tailed spectra"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.7  # S: fraction of the prunable weights set to zero
    spread: float = 0.3  # eps: sparsities are the target times 1 ± spread, before the budget is met
    window: int = 2000  # rows of a window, fewer where a matrix is smaller; 0: the shortest side of all layers
    aspect: float = 1.0  # Q: columns of a window over its rows
    windows: int = 15  # along each side
    sample: int = 0  # compute so many of them along each side; 0: all
    fit: Fit = "peak"  # where the tail begins: peak, peak-reference (with the official bound), mid, full
    per: Per = "block"  # what gets a sparsity of its own: block or layer
    excess: Excess = "fill"  # above the cap: fill (the others take it) or clamp (as published, the budget is missed)
    min_sparsity: float = 0.0
    max_sparsity: float = 0.998

    def __post_init__(self) -> None:
        check_settings(self)
        if self.window < 0 or self.windows < 1 or not 0 <= self.sample <= self.windows or not self.aspect > 0:
            raise ConfigError(
                f"FARMS.window={self.window}, aspect={self.aspect:g}, windows={self.windows}, sample={self.sample}: give"
                " window >= 0, aspect > 0, windows >= 1 and a sample of 0 to windows."
            )

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`; data is not looked at. Raises ScoreError naming a layer whose weight is not finite."""
        structure = found(model, structure)
        cut = [layer for layer in looked_at(self, structure) if layer.kind != "conv"]  # those have windows of their own
        cut = [layer for layer in cut if layer.kind != "table"] or cut
        sides = [min(layer.rows, layer.columns) for layer in cut]
        rows = self.window or min(sides, default=Windows.rows)
        look = Look(Windows(rows, self.aspect, self.windows, self.sample), self.fit)
        return plan_by_tails(self, model, structure, look, _said(self.window, rows, sides))


def _said(asked: int, rows: int, sides: Sequence[int]) -> list[str]:
    """What the windows came to be, where they are not what was asked for."""
    if not asked and sides:
        return [f"windows of {rows} rows, the shortest side of all matrices."]
    smaller = [side for side in sides if side < rows]
    if not smaller:
        return []
    short = f"{min(smaller)} to {max(smaller)}" if min(smaller) < max(smaller) else f"{smaller[0]}"
    return [
        f"{len(smaller)} of {len(sides)} matrices are smaller than windows of {rows} rows: theirs have {short}. window=0 gives all the"
        f" shortest side, {min(sides)}."
    ]
