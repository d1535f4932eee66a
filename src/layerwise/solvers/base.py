"""What every solver offers. A solver knows tensors and treatments: no module, no config, no layer name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..passes.statistics import InputStatistics, Need
from ..plan import Prune


@dataclass
class Solved:
    """The outcome for one matrix.

    weight: (rows, columns) float32, zeros where pruned. keep: bool, True = kept.
    error: sum of squared changes of the outputs over the calibration tokens, ||(W - W') X||^2, or None where unknown.
    notes: what the user should know (a fallback, a raised damping), one sentence each.
    """

    weight: Tensor
    keep: Tensor
    error: float | None = None
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    """A frozen dataclass of plain settings; `dataclasses.asdict` of it is written into plans and results."""

    name: ClassVar[str]
    needs: ClassVar[Need]
    every_pattern: ClassVar[bool]  # False: unstructured and n:m alone

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        prunes: Sequence[Prune],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """Solve matrices that share one input, each (rows_i, columns) float32, each with its own treatment.

        `inputs` is None when `needs` is "none". Work that depends on the input alone is done once for all.
        """
        ...
