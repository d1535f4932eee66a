"""Kernels for codes: equal to the dense product of the same weights in bfloat16, near the weights before rounding."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from layerwise.runtime import Int4Linear, Int8Linear, Int8WeightLinear
from layerwise.runtime.weight_only import why_not_int4, why_not_int8
from quantized import rounded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense():
    draw = torch.Generator().manual_seed(0)
    weight = (2 * torch.rand(512, 512, generator=draw) - 1) / 512**0.5  # as nn.Linear starts
    return weight, torch.randn(16, 512, generator=draw)


def error(got, exact):
    return float((got.float() - exact).norm() / exact.norm())


def test_relative_errors_of_the_sheet(dense):
    weight, x = dense
    exact = F.linear(x, weight)
    assert error(Int8Linear(weight, None)(x), exact) < 0.03
    by_row = rounded(weight, 8, None, symmetric=True, dtype=torch.bfloat16)
    assert error(Int8WeightLinear(by_row, None, CPU)(x.bfloat16()), exact) < 0.01
    in_groups = rounded(weight, 4, 32, symmetric=False, dtype=torch.bfloat16)
    assert error(Int4Linear(in_groups, None, CPU)(x.bfloat16()), exact) < 0.08


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 512), (4, None), (3, 128), (2, 64)])
@pytest.mark.parametrize("batch", [1, 20])
def test_int4_equals_the_dense_product_of_the_codes(dense, symmetric, bits, group, batch):
    weight, x = dense
    codes = rounded(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
    bias = torch.randn(512).bfloat16()
    x = x.repeat(2, 1)[:batch].bfloat16()
    made = Int4Linear(codes, bias, CPU)
    assert error(made(x), F.linear(x.float(), codes.weight(), bias.float())) < 1e-2
    assert error(made.dense(), codes.weight()) < 1e-2


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_equals_the_dense_product_of_the_codes(dense, symmetric):
    weight, x = dense
    codes = rounded(weight.abs() if not symmetric else weight, 7, None, symmetric=symmetric, dtype=torch.bfloat16)
    made = Int8WeightLinear(codes, None, CPU)
    assert error(made(x.bfloat16()), F.linear(x.bfloat16().float(), codes.weight())) < 1e-2
    assert error(made.dense(), codes.weight()) < 4e-3
    assert made.bytes == 512 * 512 + 512 * 2


def test_bits_of_groups_of_128_are_four_and_a_quarter(dense):
    """The format of files has 4.125 with a scale alone; the kernel wants a shift beside each scale: 4.25 in memory."""
    codes = rounded(dense[0], 4, 128, symmetric=True, dtype=torch.bfloat16)
    assert codes.bits_per_weight == 4.125
    assert Int4Linear(codes, None, CPU).bytes * 8 / dense[0].numel() == 4.25


def test_what_the_kernels_do_not_hold(dense):
    four = rounded(dense[0], 4, 64, symmetric=True, dtype=torch.bfloat16)
    assert why_not_int4(four, torch.bfloat16, CPU) is None
    assert "bfloat16, the model in float32" in why_not_int4(four, torch.float32, CPU)
    assert "groups of 64 inputs, and the kernel has one for a row" in why_not_int8(four, torch.bfloat16, CPU)
    eight = rounded(dense[0], 8, None, symmetric=True, dtype=torch.bfloat16)
    assert why_not_int8(eight, torch.bfloat16, CPU) is None
    assert "8 bits" in why_not_int4(eight, torch.bfloat16, CPU)
    assert "bfloat16" in why_not_int8(eight, torch.float16, CPU)
    shifted = replace(eight, zero=eight.zero + 0.5)
    assert "whole numbers" in why_not_int8(shifted, torch.bfloat16, CPU)
    odd = rounded(dense[0][:40, :48], 4, 16, symmetric=True, dtype=torch.bfloat16)
    assert "multiples of 16" in why_not_int4(odd, torch.bfloat16, CPU)
    odd = rounded(dense[0][:48, :48], 4, 16, symmetric=True, dtype=torch.bfloat16)
    assert "groups of 16" in why_not_int4(odd, torch.bfloat16, CPU)
