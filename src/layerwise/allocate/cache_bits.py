"""Bits of a key-value cache, per stored number: nominal, and true with the scale and offset that each group of numbers carries."""

from collections.abc import Sequence
from fractions import Fraction

from ..errors import ConfigError

Pair = tuple[int, int]
FULL = 16  # bits of what is not quantised


def stored_bits(bits: int, group: int) -> Fraction:
    """True bits of one number: its code, and a share of the two 16-bit numbers of its group. 16 bits are left as they are."""
    return Fraction(bits) if bits == FULL else bits + Fraction(2 * FULL, group)


def mean_bits(
    pairs: Sequence[Pair], sizes: Sequence[Pair] | None = None, groups: Sequence[Pair] | None = None
) -> Fraction:
    """Mean bits over all numbers that a token leaves in the cache: (key bits, value bits) for each layer.

    sizes: numbers of a token's key and of its value in each layer; None: all alike. groups: numbers that share a scale, of keys and of
    values in each layer; None: nominal bits, scales and offsets not counted. Exact, so that equal budgets are equal.
    """
    sizes = sizes or [(1, 1)] * len(pairs)
    if not pairs or len(sizes) != len(pairs) or (groups is not None and len(groups) != len(pairs)):
        raise ConfigError(f"mean_bits: {len(pairs)} pairs, {len(sizes)} sizes: give each layer one of each.")
    total = Fraction(0)
    for index, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
        for which in (0, 1):
            bits = Fraction(pair[which]) if groups is None else stored_bits(pair[which], groups[index][which])
            total += bits * size[which]
    return total / sum(map(sum, sizes))
