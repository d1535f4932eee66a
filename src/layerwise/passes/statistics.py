"""What calibration tells a solver about the inputs of a layer."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["none", "squares", "gram"]  # what a solver asks for; each includes the one before it


@dataclass
class InputStatistics:
    """Sums over all calibration tokens (rows) that reached one matrix. Float32 or wider, finite.

    tokens: how many rows were seen; 0 for an expert that no token was routed to.
    squares: (columns,) sum of x_j^2 over tokens: column sums of squares, not divided by anything.
    gram: (columns, columns) X^T X summed over tokens, or None when only squares were asked for.
    """

    tokens: int
    squares: Tensor
    gram: Tensor | None = None
