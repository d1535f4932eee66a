"""What the layers that a plan quantises or factorises take in bits, true or nominal, and whether that is within its budget."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from .plan_check import Sized
from .treatments import Treatments


def bits_taken(
    entries: Mapping[str, Treatments], layers: Iterable[Sized], *, nominal: bool = False, shift: bool = False
) -> tuple[int, int]:
    """(bits, weights) of the layers that are quantised or factorised. nominal: scales and zeros, or factors, not counted; shift: a zero
    takes 16 bits."""
    bits = weights = 0
    for layer in layers:
        entry = entries.get(layer.name)
        if entry and entry.quantize:
            bits += entry.quantize.stored_bits(layer.size, layer.columns, nominal=nominal, shift=shift)
            weights += layer.size
        elif entry and entry.factorize:
            bits += entry.factorize.stored_bits(layer.size, layer.rows, layer.columns, nominal=nominal)
            weights += layer.size
    return bits, weights


def allowed(bits: float, weights: int) -> int:
    """Whole bits that `weights` weights may take at `bits` each: the decimal that was written, but for the rounding of a quotient."""
    return math.floor(Fraction(repr(float(bits))) * weights * (1 + Fraction(1, 10**15)))


def over_budget(wanted: float, bits: int, weights: int) -> list[str]:
    """The problem, if the layers take more than `wanted` bits per weight."""
    if bits <= allowed(wanted, weights):
        return []
    got = bits / weights
    return [
        f"plan: budget.bits {wanted:g} is {allowed(wanted, weights)} bits for {weights} weights, the layers take {bits} ({got:.6f})."
        f" Lower the bits of some, or set budget.bits to {got!r}."
    ]
