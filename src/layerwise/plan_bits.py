"""The budget of a plan; what the layers that it quantises or factorises take in bits, true or nominal, and whether that is within it."""

import fractions
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from .plan_check import Sized
from .treatments import USUAL, Count, Fraction, GroupBits, Number, Record, Treatments

Amount = Annotated[Number, Field(ge=0)]


class Budget(Record):
    """What the layers of the plan may cost together. `sparsity` counts the layers that the plan prunes, `bits` those it quantises
    or factorises."""

    sparsity: Fraction | None = Field(default=None, description="give the fraction removed, 0 <= sparsity <= 1")
    parameters: Amount | None = Field(default=None, description="give a number of parameters, at least 0")
    bits: Amount | None = Field(default=None, description="give bits per weight, at least 0")
    nominal: Literal[True] | None = None  # bits are counted without scales and zeros
    # zeros are any numbers, as wide as a scale, not whole ones of as many bits as a weight; scales have other than 16 bits
    shift: Literal[True] | None = None
    scale_bits: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="give bits, such as 32")
    flops: Amount | None = Field(default=None, description="give a number of operations, at least 0")
    bytes: Amount | None = Field(default=None, description="give a number of bytes, at least 0")
    # these are for the reader (`Plan.with_achieved`), never trusted
    achieved: Number | None = None  # sparsity
    achieved_bits: Number | None = None  # true bits per weight, scales and zeros counted
    nominal_bits: Number | None = None

    @property
    def group_bits(self) -> GroupBits:
        """What each group of a quantised layer is counted with."""
        return GroupBits(self.scale_bits or USUAL.scale, bool(self.shift))

    def counting(self, group_bits: GroupBits) -> "Budget":
        """The same budget, counted with these."""
        scale_bits = None if group_bits.scale == USUAL.scale else group_bits.scale
        return self.model_copy(update={"shift": group_bits.shift or None, "scale_bits": scale_bits})


def bits_taken(
    entries: Mapping[str, Treatments],
    layers: Iterable[Sized],
    *,
    nominal: bool = False,
    group_bits: GroupBits = USUAL,
) -> tuple[int, int]:
    """(bits, weights) of the layers that are quantised or factorised. nominal: scales and zeros, or factors, not counted."""
    bits = weights = 0
    for layer in layers:
        entry = entries.get(layer.name)
        if entry and entry.quantize:
            bits += entry.quantize.stored_bits(layer.size, layer.columns, nominal=nominal, group_bits=group_bits)
            weights += layer.size
        elif entry and entry.factorize:
            bits += entry.factorize.stored_bits(layer.size, layer.rows, layer.columns, nominal=nominal)
            weights += layer.size
    return bits, weights


def allowed(bits: float, weights: int) -> int:
    """Whole bits that `weights` weights may take at `bits` each: the decimal that was written, but for the rounding of a quotient."""
    return math.floor(fractions.Fraction(repr(float(bits))) * weights * (1 + fractions.Fraction(1, 10**15)))


def over_budget(wanted: float, bits: int, weights: int, group_bits: GroupBits = USUAL) -> list[str]:
    """The problem, if the layers take more than `wanted` bits per weight."""
    if bits <= allowed(wanted, weights):
        return []
    got = bits / weights
    how, plan_anew = "", ""
    if group_bits != USUAL:
        how = f" with the solver's scales{' and zeros' if group_bits.shift else ''} of {group_bits.scale} bits"
        plan_anew = " plan for this solver,"
    return [
        f"plan: budget.bits {wanted:g} is {allowed(wanted, weights)} bits for {weights} weights, the layers take {bits} ({got:.6f}){how}."
        f" Lower the bits of some,{plan_anew} or set budget.bits to {got!r}."
    ]
