"""Bits of a cache: the worked examples, sizes that differ, scales counted."""

from fractions import Fraction

import pytest

from layerwise.allocate import mean_bits, stored_bits
from layerwise.errors import ConfigError


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ({(8, 8): 1, (4, 4): 6, (2, 2): 9, (4, 2): 16}, 3.0625),
        ({(2, 2): 4, (4, 4): 6, (4, 2): 20, (8, 4): 2}, 3.25),
    ],
)
def test_the_worked_examples(counts, bits):
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    assert len(pairs) == 32
    assert mean_bits(pairs) == bits


def test_scales_and_offsets_count():
    assert stored_bits(4, 128) == 4.25
    assert stored_bits(3, 32) == 4
    assert stored_bits(16, 32) == 16
    assert mean_bits([(4, 2)], groups=[(32, 64)]) == (5 + 2.5) / 2
    assert mean_bits([(16, 2)], groups=[(64, 64)]) == 9.25


def test_layers_count_by_what_they_store():
    assert mean_bits([(8, 8), (2, 4)], sizes=[(64, 64), (256, 128)]) == Fraction(64 * 16 + 512 + 512, 512)


def test_each_layer_needs_its_pair():
    for arguments in (([],), ([(2, 2)], [(1, 1)] * 2), ([(2, 2)], None, [])):
        with pytest.raises(ConfigError, match="give each layer one of each"):
            mean_bits(*arguments)
