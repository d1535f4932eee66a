"""GPTQ: quantize column by column, and let the weights still to come make up for it (Frantar et al. 2023, arXiv:2210.17323).

The sweep, the factor and the gram are those of SparseGPT (see there); what a column loses is what lies between its weights and their
codes. A matrix that is to be pruned, too, loses its pruned weights in the same sweep: the mask is SparseGPT's, pruned weights are code
zero, and both are made up for. Matrices that share an input share one sweep, also with different bits.

Departures from the official code (github.com/IST-DASLab/gptq): D1 the parameters of a group are fitted on its weights as they are when
the sweep comes to it (the official code reads them from an array that is refreshed at block ends alone, so later groups of a block
see stale weights). D2 weights on dead inputs are rounded to the nearest, not zeroed: other data may reach them. D3 a failed
factorisation is tried once more with ten times the damping; if that fails, too, the matrices of this input are treated as in D4. Either
is a note. D4 without calibration tokens: by magnitude and to the nearest, with a note. D5 with
act_order the groups stay those of consecutive inputs, fitted in advance on the original weights (official: groups of the new order, or
`static_groups`); it is the default, since it costs little and wins clearly where inputs differ in power. D6 a symmetric grid reaches
both ways, and groups of one value are exact: see `grids.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..passes.statistics import InputStatistics, Need
from ..plan import GroupBits, Prune, Treatments
from .base import PRUNES, QUANTIZES, Solved, Treated, checked
from .column_grids import ColumnGrids
from .factor import Factor, FactorError, factorise
from .grids import Grid, ScaleName, bits_of_group, check_grid, scale_dtype_of
from .masking import calibrated, check_weights, keep_by_score, masked, why_blind
from .round_to_nearest import check_groups, quantized, rounded
from .sparsegpt import check_sweep, finished
from .sweep import sweep

NOTHING = Prune(sparsity=0)
RAISES = 1  # a gram that ten times the damping does not mend is no sum of squares: its inverse says nothing
NO_FACTOR = "its inputs' second moments could not be factorised, with ten times the damping neither (more calibration tokens help)"


@dataclass(frozen=True)
class GPTQ:
    """Codes in 2 to 8 bits, zeros, or both at once, each column made up for by the next."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[Need] = "gram"
    treats: ClassVar[frozenset[str]] = PRUNES | QUANTIZES
    every_pattern: ClassVar[bool] = False

    damp: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 128  # columns among which a mask is chosen at once; without pruning it changes nothing but the speed
    act_order: bool = True  # inputs of most power first, where nothing is pruned; groups are then fitted in advance
    mse: bool = False  # search the range of each group for the least error; else it covers all weights
    scales: ScaleName = "auto"  # dtype that scales are stored in; auto: the model's where it has 16 bits, else float16

    def __post_init__(self) -> None:
        check_sweep("GPTQ", self.damp, self.block)
        check_grid("GPTQ", "integer", self.scales)

    @property
    def group_bits(self) -> GroupBits:
        """See `Solver`."""
        return bits_of_group(self.scales)

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError where weights or second moments are not finite."""
        inputs = calibrated("GPTQ", inputs, "round_to_nearest")
        ways = checked(self, treatments)
        check_weights(weights, inputs)
        for weight, way in zip(weights, ways, strict=True):
            check_groups(weight, way.quantize.group if way.quantize else None)
        why = why_blind(inputs)
        if not why:
            if inputs.gram is None:
                raise ConfigError('GPTQ needs the gram of the inputs: collect statistics with needs="gram".')
            try:
                return self._solve(weights, inputs, inputs.gram, ways)
            except FactorError:
                why = NO_FACTOR
        return [self._blind(weight, way, why) for weight, way in zip(weights, ways, strict=True)]

    def _grid(self, way: Treatments) -> Grid | None:
        if way.quantize is None:
            return None
        return Grid(way.quantize.bits, way.quantize.symmetric, mse=self.mse, scale_dtype=scale_dtype_of(self.scales))

    def _blind(self, weight: Tensor, way: Treatments, why: str) -> Solved:
        """Where inputs say nothing: the smallest weights go, the others to their nearest code."""
        done = {"prune": "pruned by magnitude", "quantize": "rounded to the nearest"}
        note = f"{why}: {', then '.join(words for field, words in done.items() if getattr(way, field))}"
        left = masked(weight, keep_by_score(weight.abs(), way.prune or NOTHING, "layer"), note=note)
        grid = self._grid(way)
        if way.quantize is None or grid is None:
            return left
        return quantized(weight, rounded(left.weight, way.quantize, grid), None, left.keep, (note,))

    def _solve(
        self, weights: Sequence[Tensor], inputs: InputStatistics, gram: Tensor, ways: Sequence[Treatments]
    ) -> list[Solved]:
        """One sweep for all that have the same groups: of quantization, of n:m, and the order of columns."""
        kinds: dict[tuple[bool, int, int], list[int]] = {}
        for index, way in enumerate(ways):
            m = way.prune.nm[1] if way.prune and way.prune.nm else 0
            group = (way.quantize.group or weights[index].shape[1]) if way.quantize else 0
            pruned = bool(m or (way.prune and way.prune.sparsity))
            ordered = (
                self.act_order and not pruned
            )  # sorted, strong inputs would share a block, and its part of the zeros
            kinds.setdefault((ordered, m, group), []).append(index)
        factors: dict[bool, tuple[Factor, Tensor | None]] = {}
        solved: dict[int, Solved] = {}
        for (ordered, _, _), chosen in kinds.items():
            if ordered not in factors:
                factors[ordered] = _factored(gram, self.damp, ordered)
            swept = self._swept([weights[i] for i in chosen], inputs, [ways[i] for i in chosen], *factors[ordered])
            solved.update(zip(chosen, swept, strict=True))
        return [solved[index] for index in range(len(weights))]

    def _swept(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics,
        ways: Sequence[Treatments],
        factor: Factor,
        order: Tensor | None,
    ) -> list[Solved]:
        """order: which column comes when; None: as they are."""
        quantizes = [way.quantize for way in ways if way.quantize]  # all of them or none
        chosen = [grid for way in ways if (grid := self._grid(way))]
        grids = ColumnGrids(weights, quantizes, chosen, order) if quantizes else None
        prunes = [way.prune or NOTHING for way in ways]
        taken = weights if order is None else [weight[:, order] for weight in weights]
        swept = sweep(taken, factor, prunes, self.block, grids=grids)
        back = None if order is None else order.argsort()
        codes = grids.codes(back) if grids else [None] * len(weights)
        solved = []
        for weight, one, its in zip(weights, swept, codes, strict=True):
            if back is not None:
                one.weight, one.keep = one.weight[:, back], one.keep[:, back]
            result = finished(weight, one, factor, inputs, unchanged=its is None and bool(one.keep.all()))
            result.codes = its
            solved.append(result)
        return solved


def _factored(gram: Tensor, damp: float, ordered: bool) -> tuple[Factor, Tensor | None]:
    """The factor of the damped gram, and the order of its columns: by falling power, equal ones as they come."""
    if not ordered:
        return factorise(gram, damp, raises=RAISES), None
    order = gram.diagonal().argsort(descending=True, stable=True)
    return factorise(gram[order][:, order], damp, raises=RAISES), order
