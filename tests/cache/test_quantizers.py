"""Grids of keys and values: worked numbers, the bound of the error, groups along the right axis, codes packed and unpacked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.cache import pack, quantize, quantize_reference, unpack
from layerwise.errors import ConfigError, ShapeError
from layerwise.randomness import generator_for

BITS = (2, 4, 8)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=generator_for(seed, "cache"))


def test_worked_by_hand():
    x = torch.tensor([0.1, -0.4, 0.9, 0.3])  # a range of 1.3 in 3 steps
    found = quantize(x, 2, stored=None)
    assert found.codes.tolist() == [1, 0, 3, 2]
    assert found.scale.item() == pytest.approx(0.433333, abs=1e-6)
    assert found.values().tolist() == pytest.approx([0.033333, -0.4, 0.9, 0.466667], abs=1e-6)


def test_the_reference_worked_by_hand():
    x = torch.tensor([0.1, -0.4, 0.9, 0.3])
    found = quantize_reference(x, 2)
    assert (found.codes.int() - 2).tolist() == [-1, -2, 1, 0]  # the official code's signed codes
    assert (found.offset / found.scale + 2).item() == pytest.approx(1)  # and its zero point
    assert found.values().tolist() == pytest.approx([0, -0.433333, 0.866667, 0.433333], abs=1e-6)


@given(
    st.integers(0, 10**6), st.sampled_from(BITS), st.sampled_from([-1, -2]), st.sampled_from([1e-3, 1.0, 300.0]),
    st.sampled_from([0.0, 5.0, -70.0]),
)  # fmt: skip
def test_no_value_is_off_by_more_than_half_a_step(seed, bits, axis, size, shift):
    x = drawn(2, 3, 8, 16, seed=seed) * size + shift
    for found in (quantize(x, bits, axis=axis, group=4, stored=None), quantize_reference(x, bits, axis=axis, group=4)):
        step = found.scale.repeat_interleave(4, dim=axis).flatten(axis - 1, axis)
        assert ((x - found.values()).abs() <= step / 2 + 1e-6 * (size + abs(shift))).all()
    # with scale and offset in 16 bits: what is added is their rounding, 2**-11 of each, the scale's at the far end of the range
    found = quantize(x, bits, axis=axis, group=4)
    step, low = (t.repeat_interleave(4, dim=axis).flatten(axis - 1, axis) for t in (found.scale, found.offset.abs()))
    rounding = 2**-11 * low + (2**bits - 1) * (step * 2**-11 + 2**-25)
    assert ((x - found.values()).abs() <= step / 2 + 1.01 * rounding + 1e-6).all()


def test_scale_and_offset_are_what_sixteen_bits_hold():
    found = quantize(drawn(4, 32), 4, group=8)
    for stored in (found.scale, found.offset):
        assert torch.equal(stored.half().float(), stored)
        assert stored.shape == (4, 4, 1)
    assert found.values().dtype == torch.float32
    assert quantize(drawn(4, 32).bfloat16(), 4).scale.dtype == torch.float32


def test_a_constant_group_comes_back():
    for constant in (0.0, 3.0, -1.7, 1000.3):
        x = torch.full((2, 8), constant)
        for bits in BITS:
            found = quantize(x, bits)
            assert found.scale.min() > 0
            assert torch.allclose(found.values(), x, rtol=2**-11, atol=1e-5)
            assert torch.allclose(quantize_reference(x, bits).values(), x, rtol=1e-6, atol=5e-6)


def test_an_outlier_channel_hurts_the_others_in_token_groups_alone():
    x = drawn(1, 2, 256, 64)
    x[..., 7] *= 40
    others = [channel for channel in range(64) if channel != 7]

    def error(values):
        return ((values - x)[..., others].norm() / x[..., others].norm()).item()

    assert error(quantize(x, 4, axis=-2, group=32).values()) < 0.12  # groups of a channel
    assert error(quantize(x, 4, axis=-1).values()) > 0.5  # groups of a token


def test_groups_lie_along_the_axis():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    by_token, by_channel = quantize(x, 2, axis=-1, group=3), quantize(x, 2, axis=-2, group=2)
    assert by_token.offset.flatten().tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert by_token.codes.flatten().tolist() == [0, 2, 3] * 8  # 1.5 steps round to even
    assert by_channel.offset.flatten().tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert by_channel.codes.flatten().tolist() == ([0] * 6 + [3] * 6) * 2
    assert torch.equal(by_channel.values(), x)


@given(st.integers(0, 10**6), st.sampled_from(BITS), st.integers(1, 5))
def test_packed_codes_come_back_and_take_the_bytes_they_should(seed, bits, runs):
    codes = torch.randint(2**bits, (3, 2, runs * 8 // bits), generator=generator_for(seed, "codes"), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


def test_packing_worked_by_hand():
    packed = pack(torch.tensor([1, 2, 3, 0, 2, 2, 1, 0], dtype=torch.uint8), 2)
    assert packed.tolist() == [1 | 2 << 2 | 3 << 4, 2 | 2 << 2 | 1 << 4]
    assert pack(torch.tensor([5, 15, 0, 9], dtype=torch.uint8), 4).tolist() == [5 | 15 << 4, 9 << 4]


def test_what_cannot_be_done_is_refused():
    x = torch.zeros(2, 12)
    with pytest.raises(ConfigError, match=r"bits=3: give 2, 4 or 8"):
        quantize(x, 3)
    with pytest.raises(ShapeError, match=r"12 entries do not split into groups of 8\. Take a group that divides"):
        quantize(x, 4, group=8)
    with pytest.raises(ConfigError, match=r"axis=1: count from the end"):
        quantize_reference(x, 4, axis=1)
    with pytest.raises(ShapeError, match=r"5 codes of 4 bits do not fill whole bytes"):
        pack(torch.zeros(5, dtype=torch.uint8), 4)
