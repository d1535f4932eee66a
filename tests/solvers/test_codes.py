"""Codes: the weight they stand for, their true bits, and shapes that do not fit."""

import pytest
import torch

from layerwise.errors import ShapeError
from layerwise.solvers.codes import Codes, stacked, true_bits

VALUES = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
SCALE, ZERO = torch.tensor([[0.5, 2.0], [1.0, 0.25]]), torch.tensor([[1.0, 2.0], [0.0, 3.0]])


def test_weight_worked_by_hand():
    codes = Codes(VALUES, SCALE, ZERO, bits=2, group=2, symmetric=False)
    assert codes.weight().tolist() == [[-0.5, 0.0, 0.0, 2.0], [3.0, 2.0, -0.5, -0.75]]
    whole = Codes(VALUES, SCALE[:, :1], torch.full((2, 1), 2.0), bits=2, group=None, symmetric=True)
    assert whole.weight().tolist() == [[-1.0, -0.5, 0.0, 0.5], [1.0, 0.0, -1.0, -2.0]]


def test_true_bits_worked_by_hand():
    assert true_bits(4, 128, symmetric=True) == 4.125
    assert true_bits(4, 128) == 4 + 20 / 128  # a whole zero has the bits of a code
    assert true_bits(4, 128, shift=True) == 4.25
    assert true_bits(8, 4096, symmetric=True) == 8 + 16 / 4096
    assert true_bits(2, 32, symmetric=True, scale_bits=32) == 3
    # 30 layers at 4 and 10 at 2 bits by float shift in groups of 128: 3.75, as Quanto's files have it
    assert (30 * true_bits(4, 128, shift=True) + 10 * true_bits(2, 128, shift=True)) / 40 == 3.75
    assert Codes(VALUES, SCALE, ZERO, 2, 2, symmetric=False).bits_per_weight == 2 + 18 / 2
    assert Codes(VALUES, SCALE[:, :1], ZERO[:, :1], 2, None, symmetric=True).bits_per_weight == 2 + 16 / 4
    wide = Codes(VALUES, SCALE, ZERO, 2, 2, symmetric=False, shift=True, scale_dtype=torch.float32)
    assert wide.bits_per_weight == 2 + 64 / 2


def test_matrices_of_one_layer_are_stacked_row_under_row():
    one = Codes(VALUES, SCALE, ZERO, 2, 2, symmetric=False)
    two = Codes(VALUES.flip(1), SCALE * 2, ZERO, 2, 2, symmetric=False)
    assert torch.equal(stacked([one, two]).weight(), torch.cat([one.weight(), two.weight()]))
    assert stacked([one]) is one


def test_shapes_that_do_not_fit_are_one_clear_line():
    with pytest.raises(ShapeError, match=r"codes of 2 x 4 in groups of 3: scales are \(2, 2\), not \(2, 1\)\."):
        Codes(VALUES, SCALE, ZERO, 2, 3, symmetric=False)
    with pytest.raises(ShapeError, match=r"scales are \(2, 2\), not \(2, 1\)"):
        Codes(VALUES, SCALE, ZERO, 2, None, symmetric=False)
    with pytest.raises(ShapeError, match="zeros are"):
        Codes(VALUES, SCALE, ZERO[:, :1], 2, 2, symmetric=False)
