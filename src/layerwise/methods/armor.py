"""ARMOR: every linear becomes block-diagonal x sparse n:m core x block-diagonal (Liu et al. 2026, arXiv:2510.05528).

What is decided here is the side of the diagonal blocks of each layer, which is what the factors cost: b (outputs + inputs) numbers. The
paper takes one side for all, which costs skinny layers (k, v) several times the share of others. Departure: the largest side up to
`block` that divides a layer and whose factors take no more than a share `overhead` of its weights; with `bits`, sides that are raised in
turn, where the share would be least, for as long as the whole stays within so many bits per weight. `overhead=1` gives the paper's plan.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from ..errors import BudgetError, ConfigError, ShapeError
from ..plan import Budget, Factorize, Plan
from ..plan_bits import allowed
from ..structure import Layer, Structure, factorable
from ..tasks.batches import Batches
from .assemble import found, named_plan


@dataclass(frozen=True)
class Armor:
    """Factors for every linear; numbers are counted with 16 bits each, and a bit for every position of a core."""

    name: ClassVar[str] = "armor"
    summary: ClassVar[str] = "n:m cores between block-diagonal factors, block sizes by the shapes of layers"
    needs_data: ClassVar[bool] = False

    pattern: str = "2:4"
    block: int = 128  # side of the diagonal blocks, at most
    overhead: float = 0.1  # numbers in both factors over a layer's weights, at most; the smallest block may exceed it
    bits: float | None = None  # per weight on average, at most, in the place of `overhead`
    indivisible: Literal["error", "dense"] = "error"  # layers that no block divides: refuse, or leave out

    def __post_init__(self) -> None:
        try:
            m = Factorize(block=int(self.pattern.partition(":")[2]), pattern=self.pattern).nm[1]
        except ValueError as error:  # pydantic's are
            right = Factorize.model_fields["pattern"].description
            raise ConfigError(f'Armor.pattern="{self.pattern}": {right}.') from error
        if self.block < m:
            raise ConfigError(f"Armor.block={self.block}: give at least {m}, a whole group of {self.pattern}.")
        if not self.overhead > 0 or (self.bits is not None and not self.bits > 0):
            raise ConfigError(f"Armor.overhead={self.overhead}, bits={self.bits}: give numbers above 0.")
        if self.indivisible not in ("error", "dense"):
            raise ConfigError(f'Armor.indivisible="{self.indivisible}": give "error" or "dense".')

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ShapeError naming the layers that no block divides, BudgetError for too few bits."""
        structure = found(model, structure)
        sides = {layer.name: sides_of(layer, self.block, self.pattern) for layer in structure}
        odd = [layer for layer in structure if not sides[layer.name]]
        if odd and (self.indivisible == "error" or len(odd) == len(structure.layers)):
            raise ShapeError(_indivisible(self.pattern, odd, len(structure.layers)))
        chosen = [layer for layer in structure if sides[layer.name]]
        if self.bits is None:
            ways = within(chosen, sides, self.overhead, self.pattern)
            return named_plan(self, model, structure, Budget(), ways)
        return named_plan(self, model, structure, Budget(bits=self.bits), self._budgeted(chosen, sides, self.bits))

    def _budgeted(
        self, layers: Sequence[Layer], sides: Mapping[str, Sequence[int]], bits: float
    ) -> dict[str, Factorize]:
        """From the smallest sides on, step by step in the order of the share that a step leads to, ties in the order of the model."""
        size = sum(layer.size for layer in layers)
        ways = within(layers, sides, 0.0, self.pattern)
        left = allowed(bits, size) - sum(_stored(layer, ways[layer.name]) for layer in layers)
        if left < 0:
            needed = (allowed(bits, size) - left) / size
            raise BudgetError(
                f"Armor.bits={bits:g}: cores of {self.pattern} with the smallest blocks take {needed:.4f} bits per weight."
                " Give more bits, or a sparser pattern."
            )
        steps = [
            (Factorize(block=side, pattern=self.pattern), before, layer)
            for layer in layers
            for before, side in itertools.pairwise(sides[layer.name])
        ]
        for way, before, layer in sorted(steps, key=lambda step: step[0].overhead(step[2].rows, step[2].columns)):
            more = _stored(layer, way) - _stored(layer, ways[layer.name])
            if ways[layer.name].block == before and more <= left:
                ways[layer.name] = way
                left -= more
        return ways


def sides_of(layer: Layer, most: int, pattern: str) -> list[int]:
    """Sides of diagonal blocks that fit the layer, rising: whole groups of the pattern that divide outputs and inputs, up to `most`."""
    if not factorable(layer):
        return []
    common, m = math.gcd(layer.rows, layer.columns), int(pattern.partition(":")[2])
    return [side for side in range(m, min(most, common) + 1, m) if common % side == 0]


def within(
    layers: Sequence[Layer], sides: Mapping[str, Sequence[int]], overhead: float, pattern: str
) -> dict[str, Factorize]:
    """For each layer the largest side whose factors take no more than this share of its weights, or its smallest."""
    ways = {}
    for layer in layers:
        options = [Factorize(block=side, pattern=pattern) for side in sides[layer.name]]
        fitting = [way for way in options if way.overhead(layer.rows, layer.columns) <= overhead]
        ways[layer.name] = fitting[-1] if fitting else options[0]
    return ways


def _stored(layer: Layer, way: Factorize) -> int:
    return way.stored_bits(layer.size, layer.rows, layer.columns)


def _indivisible(pattern: str, odd: Sequence[Layer], layers: int) -> str:
    shown = ", ".join(f'"{layer.name}" ({layer.rows} x {layer.columns})' for layer in odd[:4])
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    return (
        f"no diagonal block of whole groups of {pattern} divides {len(odd)} of {layers} layers (outputs x inputs), or they are no"
        f" linears of their own: {shown}{more}. Exclude them (--exclude), or leave them dense:"
        ' indivisible="dense" (--set indivisible=dense).'
    )
