"""The grids of all matrices in a sweep, held as the sweep works: column by column, the rows of all matrices side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import Quantize
from .codes import Codes
from .grids import Grid, fit
from .round_to_nearest import in_groups


class ColumnGrids:
    """Scale and zero of every row and group of matrices that have one group size; bits and symmetry may differ.

    Groups are fitted when the sweep comes to them (`fit`), on the weights as they are then. Those of a whole row, and all of a sweep in
    another order, are fitted at once, on the weights as they came. order: the columns in the order of the sweep; `weights` come in
    their own.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        quantizes: Sequence[Quantize],
        grids: Sequence[Grid],
        order: Tensor | None = None,
    ) -> None:
        columns, device = weights[0].shape[1], weights[0].device
        self.quantizes, self.grids = quantizes, grids
        self.rows = [weight.shape[0] for weight in weights]
        self.size = quantizes[0].group or columns  # of a group
        self.static = order is not None or self.size == columns
        shape = columns // self.size, sum(self.rows)
        self.scale, self.zero = torch.ones(shape, device=device), torch.zeros(shape, device=device)
        self.low, self.high = torch.zeros(shape, device=device), torch.zeros(shape, device=device)  # of steps from zero
        self.values = torch.empty(columns, shape[1], dtype=torch.uint8, device=device)
        place = torch.arange(columns, device=device) if order is None else order
        self._group_of = place // self.size
        by_group = list(zip(self.scale, self.low, self.high, strict=True))
        self.lines = [by_group[group] for group in self._group_of.tolist()]  # of each column, each (all rows,)
        if self.static:
            fitted = [fit(in_groups(w, q.group), g) for w, q, g in zip(weights, quantizes, grids, strict=True)]
            for index, (scale, zero) in enumerate(fitted):
                part = self._rows_of(index)
                self.scale[:, part] = scale.reshape(self.rows[index], -1).T
                self.zero[:, part] = zero.reshape(self.rows[index], -1).T
            self._bound(slice(None))

    @property
    def unit(self) -> int:
        """Columns that a block must hold whole."""
        return 1 if self.static else self.size

    def starts(self, start: int, stop: int) -> range:
        """The columns in this range of whole groups at which one is to be fitted."""
        return range(0) if self.static else range(start, stop, self.size)

    def fit(self, column: int, current: Tensor) -> None:
        """Fit the group that begins here. current: (size, all rows), its weights as they are, zeros where pruned."""
        group = column // self.size
        for index, grid in enumerate(self.grids):
            part = self._rows_of(index)
            self.scale[group, part], self.zero[group, part] = fit(current[:, part].T.contiguous(), grid)
        self._bound(group)

    def take(self, start: int, stop: int, steps: Tensor) -> Tensor:
        """Keep the codes of these columns and return the weights they stand for. steps: (columns, all rows), whole, from zero."""
        groups = self._group_of[start:stop]
        self.values[start:stop] = steps - self.low[groups]
        weights = steps * self.scale[groups]
        return weights.add_(0.0)  # no negative zeros

    def codes(self, back: Tensor | None = None) -> list[Codes]:
        """Those of each matrix. back: where each column is in the order of the sweep."""
        values = self.values if back is None else self.values[back]
        return [
            Codes(
                values[:, part].T.contiguous(),
                self.scale[:, part].T.contiguous(),
                self.zero[:, part].T.contiguous(),
                quantize.bits,
                quantize.group,
                quantize.symmetric,
                scale_dtype=grid.scale_dtype,
            )
            for part, quantize, grid in zip(
                map(self._rows_of, range(len(self.rows))), self.quantizes, self.grids, strict=True
            )
        ]

    def _rows_of(self, index: int) -> slice:
        first = sum(self.rows[:index])
        return slice(first, first + self.rows[index])

    def _bound(self, groups: slice | int) -> None:
        """How far below and above zero codes go."""
        self.low[groups] = -self.zero[groups]
        for index, grid in enumerate(self.grids):
            part = self._rows_of(index)
            self.high[groups, part] = grid.top - self.zero[groups, part]
