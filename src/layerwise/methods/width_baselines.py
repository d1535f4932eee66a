"""Every group keeps the same share: by the size of weights, or at random. The rows that any method for width is compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..allocate.units import meet
from ..plan import Plan
from ..randomness import generator_for
from ..scores.units import magnitudes
from ..structure import Structure
from ..tasks.batches import Batches
from .base import Method
from .widths import Widths, check_share, lowest_go, widths_plan

__all__ = ["MagnitudeWidth", "RandomWidth"]


@dataclass(frozen=True)
class MagnitudeWidth:
    """Heads and channels of the smallest weights go, the same share everywhere."""

    name: ClassVar[str] = "magnitude-width"
    summary: ClassVar[str] = "fewer heads and channels, the same share in every block, those of the smallest weights"
    needs_data: ClassVar[bool] = False

    parameters: float = 0.8  # share of the model's parameters that is kept, or their number
    power: int = 2
    min_heads: int = 1
    min_channels: int = 1
    multiple_of: int = 1  # of channels
    budget: str = "parameters"  # what the share is of: parameters, bytes, macs (a token), latency (here)
    rows: int = 1  # of latency: tokens in a forward pass

    def __post_init__(self) -> None:
        check_share("MagnitudeWidth", self.parameters)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        widths = _widths(self, model, structure)
        scores = magnitudes(model, widths.groups, self.power)
        counts = meet(widths.total, widths.sized, widths.target, widths.evenly([*widths.sized]))
        return widths_plan(self, widths, lowest_go(scores, counts))


@dataclass(frozen=True)
class RandomWidth:
    """Heads and channels at random, the same share everywhere: the control."""

    name: ClassVar[str] = "random-width"
    summary: ClassVar[str] = "fewer heads and channels, the same share in every block, drawn at random"
    needs_data: ClassVar[bool] = False

    parameters: float = 0.8
    seed: int = 0
    min_heads: int = 1
    min_channels: int = 1
    multiple_of: int = 1
    budget: str = "parameters"  # what the share is of: parameters, bytes, macs (a token), latency (here)
    rows: int = 1  # of latency: tokens in a forward pass

    def __post_init__(self) -> None:
        check_share("RandomWidth", self.parameters)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        widths = _widths(self, model, structure)
        scores = {
            group.name: torch.rand(group.units, generator=generator_for(self.seed, group.name))
            for group in widths.groups
        }
        counts = meet(widths.total, widths.sized, widths.target, widths.evenly([*widths.sized]))
        return widths_plan(self, widths, lowest_go(scores, counts))


def _widths(method: "MagnitudeWidth | RandomWidth", model: nn.Module, structure: Structure | None) -> Widths:
    return Widths(
        type(method).__name__,
        model,
        structure,
        method.parameters,
        min_heads=method.min_heads,
        min_channels=method.min_channels,
        multiple_of=method.multiple_of,
        budget=method.budget,
        rows=method.rows,
    )


_: type[Method] = MagnitudeWidth
