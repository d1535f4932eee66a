"""Codes in words: the layout's worked numbers, every width and length there and back, and the library whose layout it is."""

import pytest
import torch

from layerwise.io import packing
from layerwise.io.packing import pack, unpack, words_of


def hexadecimal(words):
    return [f"0x{int(word) & 0xFFFFFFFF:08x}" for word in words.flatten()]


def draw(bits, rows, count, seed=0):
    return torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_four_bits_worked_by_hand():
    signed = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]])
    assert hexadecimal(pack(signed + 8, 4)) == ["0xfea98710"]


def test_three_bits_fill_three_words():  # 32 codes, two of which lie across words
    signed = torch.arange(-4, 4).repeat(4)[None]
    assert hexadecimal(pack(signed + 4, 3)) == ["0x88fac688", "0xc688fac6", "0xfac688fa"]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 100])
def test_there_and_back(bits, count):
    codes = draw(bits, 3, count)
    packed = pack(codes, bits)
    assert packed.shape == (3, words_of(count, bits)) == (3, -(-count * bits // 32))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_rows_in_parts_give_the_same(monkeypatch):
    codes = draw(5, 7, 40)
    whole = pack(codes, 5)
    monkeypatch.setattr(packing, "AT_ONCE", 80)  # two rows at a time, the last alone
    assert torch.equal(pack(codes, 5), whole)
    assert torch.equal(unpack(whole, 5, 40), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 33, 577])
def test_the_layout_is_that_of_compressed_tensors(bits, count):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = draw(bits, 5, count)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), theirs.pack_to_int32(signed, bits))
    assert torch.equal(pack(codes.T, bits).T, theirs.pack_to_int32(signed, bits, packed_dim=0))
