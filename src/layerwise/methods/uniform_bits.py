"""Uniform bits: the same level for every layer. The control of the methods that hand bits out, and plain quantisation.

Needs nothing but shapes.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import ConfigError
from ..plan import Plan
from ..structure import Structure
from ..tasks.batches import Batches
from .handing_out import BitSettings, Indivisible, dealt


@dataclass(frozen=True)
class UniformBits:
    """`bits` is the level itself, without scales and zeros; what they add is in the plan."""

    name: ClassVar[str] = "uniform-bits"
    summary: ClassVar[str] = "the same bits for every layer"
    needs_data: ClassVar[bool] = False

    bits: int = 4
    group: int = 128  # inputs that share a scale; 0: all of a row
    symmetric: bool = True  # transformers cannot read packed weights with zeros of their own
    # what the solver stores of each group; compress hands in what its own does
    shift: bool = False  # zeros are any numbers, as wide as a scale, not whole ones of as many bits as a weight
    scale_bits: int = 16
    indivisible: Indivisible = "smaller"  # layers whose inputs the group does not divide: smaller, row, or error

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"UniformBits.bits={self.bits}: give whole bits, 2 to 8.")
        self._settings()

    def _settings(self) -> BitSettings:
        return _Same(
            bits=self.bits, levels=str(self.bits), granularity="layer", group=self.group, symmetric=self.symmetric,
            shift=self.shift, scale_bits=self.scale_bits, nominal=True, indivisible=self.indivisible,
        )  # fmt: skip

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ShapeError naming the layers that the group does not divide."""
        hand = dealt(self, self._settings(), model, structure)
        return hand.plan(model, dict.fromkeys(hand.units, self.bits), {})


class _Same(BitSettings):
    """One level, for all."""

    @property
    def owner(self) -> str:
        return UniformBits.__name__
