"""What calibration tells a solver about the inputs of a layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import StatisticsError

Need = Literal["none", "squares", "gram"]  # what a solver asks for; each includes the one before it


@dataclass
class InputStatistics:
    """Sums over all calibration tokens (rows) that reached one matrix. Float32, finite.

    tokens: how many rows were seen; 0 for an expert that no token was routed to.
    squares: (columns,) sum of x_j^2 over tokens: column sums of squares, not divided by anything.
    gram: (columns, columns) X^T X summed over tokens, or None when only squares were asked for.
    called: False where the matrix's module never ran, so that its inputs, if it has any, could not be seen.
    """

    tokens: int
    squares: Tensor
    gram: Tensor | None = None
    called: bool = True

    def check(self, layer: str) -> None:
        """Raise StatisticsError naming the layer if any sum is not finite."""
        total = self.gram if self.gram is not None else self.squares
        if not torch.isfinite(total.sum()) and not (finite := total.isfinite()).all():
            columns = total.shape[0] - int((finite if finite.dim() == 1 else finite.all(1)).sum())
            raise StatisticsError(
                f'layer "{layer}": {columns} of its {total.shape[0]} inputs are not finite on the calibration data. Look for'
                " NaN or overflow in the blocks before it; float32 or bfloat16 overflow less than float16."
            )


_ENOUGH_ROWS = 1024  # fewer are kept until there are so many: a product of few rows is bound by reading the sum
_STRIPS = 4  # X^T X is symmetric: in 4 strips, each from the diagonal on, it takes 0.625 of the full product
_WORTH_STRIPS = 512  # columns; narrower matrices lose more in small products than they gain

_HALF = (torch.float16, torch.bfloat16)


def widest(device: torch.device) -> torch.dtype:
    """What long sums are carried in: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class Accumulator:
    """Adds up the statistics of one matrix, batch by batch, in float32 on the device where the rows are.

    Sums of squares are carried over batches in float64: it costs nothing and makes the order of batches immaterial.
    Of X^T X only the part on and above the diagonal is computed, in strips; the rest is mirrored when it is read. Rows in half precision
    on CUDA are multiplied as they are, with float32 results: their products are exact in it, and matrix units are many times as fast.
    """

    def __init__(self, columns: int, need: Need, device: torch.device) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=widest(device), device=device)
        self._gram = torch.zeros(columns, columns, device=device) if need == "gram" else None
        self._half = False  # what lies below the diagonal is out of date
        self._waiting: list[Tensor] = []

    @property
    def gram(self) -> Tensor | None:
        """(columns, columns), all rows so far counted; None when only squares were asked for."""
        if self._gram is None:
            return None
        if self._waiting:
            self._add_products(torch.cat(self._waiting))
            self._waiting = []
        if self._half:
            below = torch.ones_like(self._gram, dtype=torch.bool).tril_(-1)
            self._gram = torch.where(below, self._gram.T, self._gram)
            self._half = False
        return self._gram

    def add(self, rows: Tensor) -> None:
        """rows: (tokens, columns), any floating dtype."""
        rows = rows.detach()
        self.tokens += rows.shape[0]
        if self._gram is None:
            self.squares += torch.linalg.vector_norm(rows.float(), dim=0).square_()
            return
        if rows.device.type != "cuda" or rows.dtype not in _HALF:
            rows = rows.float()
        if len(rows) >= _ENOUGH_ROWS:
            self._add_products(rows)
            return
        self._waiting.append(rows.clone())  # the model may write into its own activations later
        if sum(len(some) for some in self._waiting) >= _ENOUGH_ROWS:
            self._add_products(torch.cat(self._waiting))
            self._waiting = []

    def _add_products(self, rows: Tensor) -> None:
        assert self._gram is not None  # noqa: S101  (asked for)
        columns = rows.shape[1]
        if columns < _WORTH_STRIPS:
            _add_product(self._gram, rows, rows)
            return
        self._half = True
        width = -(-columns // _STRIPS)
        for start in range(0, columns, width):
            strip = self._gram[start : start + width, start:]
            _add_product(strip, rows[:, start : start + width], rows[:, start:])

    def result(self) -> InputStatistics:
        """What was summed so far."""
        if (gram := self.gram) is not None:
            return InputStatistics(self.tokens, gram.diagonal().clone(), gram)
        return InputStatistics(self.tokens, self.squares.float())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
