"""One layer's codes as stored tensors: what the format cannot hold, zeros widened away, what a reader computes."""

from dataclasses import replace

import pytest
import torch

from layerwise.errors import ModelError
from layerwise.io.pack_quantized import codes_of, scheme_of, tensors_of, weight_of, why_not, widened
from layerwise.solvers.codes import Codes
from quantized import rounded

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def layer(rows=6, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_there_and_back(bits, group, symmetric):
    codes = rounded(layer(), bits, group, symmetric=symmetric, dtype=HALF)
    stored = tensors_of(codes)
    assert stored["weight_packed"].shape == (6, 2 * bits)  # 64 codes
    assert stored["weight_scale"].dtype == HALF
    assert ("weight_zero_point" in stored) is not symmetric
    back = codes_of(stored, scheme_of(codes), "here")
    assert all(torch.equal(getattr(back, name), getattr(codes, name)) for name in ("values", "scale", "zero"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [BRAIN, FULL])
def test_the_library_unpacks_the_same_weight(dtype, symmetric):
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    codes = rounded(layer(), 3, 16, symmetric=symmetric, dtype=BRAIN)
    weights = quantization.QuantizationArgs(num_bits=3, symmetric=symmetric, strategy="group", group_size=16)
    stored = tensors_of(codes)
    stored["weight_scale"] = stored["weight_scale"].to(dtype)  # as transformers reads it
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = base.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(theirs, weight_of(codes, dtype))
    assert torch.equal(theirs, codes.weight().to(dtype))


def test_true_bits_are_those_stored():  # 4 bits in symmetric groups of 128 with 16-bit scales: 4.125
    stored = tensors_of(rounded(layer(8, 256), 4, 128, symmetric=True, dtype=HALF))
    size = sum(stored[name].numel() * stored[name].element_size() for name in ("weight_packed", "weight_scale"))
    assert 8 * size / (8 * 256) == 4.125


def test_zeros_widened_away_by_hand():
    """Codes 0..3 around a zero of 1 are -1..2: three bits symmetric, code 4 being zero."""
    codes = Codes(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1), 2, None, False)
    wide = widened(codes)
    assert wide is not None
    assert (wide.bits, wide.symmetric, wide.values.tolist()) == (3, True, [[3, 4, 5, 6]])
    assert torch.equal(wide.weight(), codes.weight())


def test_widening_takes_no_bit_that_it_does_not_need():
    middle = Codes(torch.tensor([[0, 3]], dtype=torch.uint8), torch.ones(1, 1), 2 * torch.ones(1, 1), 2, None, False)
    wide = widened(middle)
    assert wide is not None
    assert wide.bits == 2


def test_nine_bits_are_too_many():
    codes = Codes(torch.tensor([[0, 255]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), 8, None, False)
    assert widened(codes) is None


def test_what_the_format_cannot_hold():
    codes = rounded(layer(), 4, 16, symmetric=False, dtype=HALF)
    assert why_not(codes, HALF) is None
    assert why_not(codes, FULL) is None  # float32 holds float16
    assert "no whole codes" in str(why_not(replace(codes, shift=True), HALF))
    assert "no whole codes" in str(why_not(replace(codes, zero=codes.zero + 0.5), HALF))
    assert "outside" in str(why_not(replace(codes, zero=codes.zero + 16), HALF))
    assert "no bfloat16 numbers" in str(why_not(codes, BRAIN))
    assert "1 to 8 bits" in str(why_not(replace(codes, bits=9), HALF))


def test_files_that_contradict_the_config():
    codes = rounded(layer(), 3, 16, symmetric=False, dtype=HALF)
    stored, scheme = tensors_of(codes), scheme_of(codes)
    with pytest.raises(ModelError, match=r"before 0\.18 packed 3"):
        codes_of(stored | {"weight_packed": torch.zeros(6, 7, dtype=torch.int32)}, scheme, "here")  # 10 codes a word
    with pytest.raises(ModelError, match=r"scales are \[6, 4\], config.json makes them \[6, 2\]"):
        codes_of(stored, replace(scheme, group=32), "here")
    del stored["weight_zero_point"]
    with pytest.raises(ModelError, match="weight_zero_point is missing"):
        codes_of(stored, scheme, "here")
    with pytest.raises(ModelError, match="weight_scale is missing"):
        codes_of({"weight_packed": stored["weight_packed"]}, scheme, "here")
