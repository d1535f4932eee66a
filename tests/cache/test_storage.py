"""Both layouts of codes hold the same numbers in the same bytes; the one that CUDA reads with Triton too."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.cache import QuantizedKVCache, cache_bytes, quantize
from layerwise.cache.scheme import Grouping, Scheme
from layerwise.cache.storage import Planes, Rows, layout_of
from layerwise.randomness import generator_for


def states(*shape, seed=0):
    return torch.randn(shape, generator=generator_for(seed, "storage")) * 3 + 1


@given(
    st.sampled_from([(2, 8), (2, 16), (2, 64), (4, 4), (4, 16), (4, 64)]), st.integers(1, 3), st.integers(1, 40),
    st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 10**6),
)  # fmt: skip
def test_rows_and_planes_hold_the_same_numbers_in_the_same_bytes(grid, groups, tokens, room, dtype, seed):
    bits, group = grid
    x = states(2, 3, tokens, groups * group, seed=seed)
    found = []
    for layout in (Rows(bits, group), Planes(bits, -1, group)):
        parts, finite = layout.write(x)
        assert finite.isfinite().all()
        read = layout.read(parts, room, x.to(dtype))
        assert read.dtype == dtype
        assert read.shape == (2, 3, tokens + room, groups * group)
        found.append((read[:, :, :tokens], sum(part.nbytes for part in parts)))
    (rows, rows_bytes), (planes, planes_bytes) = found
    assert rows_bytes == planes_bytes == x.numel() * bits // 8 + x.numel() // group * 4
    assert torch.equal(planes, quantize(x, bits, group=group).values().to(dtype))
    # product and sum may be rounded once in the one, twice in the other
    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    assert torch.allclose(rows.float(), planes.float(), rtol=ulp, atol=2.0**-20)


def test_numbers_of_other_kinds_have_planes():
    x = states(1, 1, 4, 24)
    assert isinstance(layout_of(4, Grouping(-1, 24, 1, 0), x), Rows)
    for bits, grouping in ((8, Grouping(-1, 24, 1, 0)), (4, Grouping(-2, 4, 4, 0)), (2, Grouping(-1, 4, 1, 0))):
        assert isinstance(layout_of(bits, grouping, x), Planes)


def test_not_finite_is_told_in_both_layouts():
    x = states(1, 1, 4, 16)
    x[0, 0, 2, 3] = float("inf")
    assert not Rows(4, 16).write(x)[1].isfinite().all()
    assert not Planes(8, -2, 4).write(x)[1].isfinite().all()


@given(st.integers(0, 200), st.integers(0, 300), st.sampled_from(["per-token", "kivi"]))
def test_the_residual_bounds_what_stays(residual, tokens, mode):
    scheme = Scheme(mode, 32, residual + 32 * (mode == "kivi"))
    for grouping in (scheme.keys(64), scheme.values(64)):
        coded, later = grouping.quantized(tokens), grouping.quantized(tokens + 1)
        assert coded % grouping.unit == 0
        assert later in (coded, coded + grouping.unit)
        assert grouping.keep <= scheme.window
        assert coded == 0 or grouping.keep <= tokens - coded < grouping.keep + grouping.unit
    if mode == "per-token":  # at most the residual, and no step but the last of a unit writes
        assert tokens - scheme.keys(64).quantized(tokens) < max(residual, 1)


def test_by_default_32_tokens_are_written_at_once():
    keys, values = states(2, 2, 100, 16), states(2, 2, 100, 16, seed=1)
    cache = QuantizedKVCache([(4, 2)])
    cache.update(keys[:, :, :60], values[:, :, :60], 0)
    for token in range(60, 100):
        now = tuple(one[:, :, token : token + 1] for one in (keys, values))
        before = [side.coded for side in cache.layers[0].sides]
        got = cache.update(*now, 0)
        assert before == [token // 32 * 32] * 2
        for bits, ours, states_ in zip((4, 2), got, (keys, values)):
            coded = before[0]
            assert torch.allclose(ours[:, :, :coded], quantize(states_[:, :, :coded], bits).values(), atol=1e-6)
            assert torch.equal(ours[:, :, coded:], states_[:, :, coded : token + 1])
        assert cache.nbytes == cache_bytes([(4, 2)], cache.scheme, token + 1, 2, 16, batch=2, exact=4)
        held = [part for side in cache.layers[0].sides for part in side.tensors()]
        assert sum(part.untyped_storage().nbytes() for part in held) == cache.nbytes


def test_a_quantised_prefill_leaves_nothing_exact_unless_asked():
    keys, values = states(1, 1, 40, 16), states(1, 1, 40, 16, seed=1)
    for residual, coded in ((None, 40), (0, 40), (32, 32), (40, 32)):
        cache = QuantizedKVCache([(4, 4)], residual=residual, quantize_prefill=True)
        got, _ = cache.update(keys, values, 0)
        assert cache.layers[0].sides[0].coded == coded
        assert torch.allclose(got[:, :, :coded], quantize(keys[:, :, :coded], 4).values(), atol=1e-6)
        assert torch.equal(got[:, :, coded:], keys[:, :, coded:])


def test_what_was_given_out_stays_as_it_was():
    """A model may keep it: layers that share their keys do."""
    cache = QuantizedKVCache([(4, 4), (4, 4)])
    keys, values = states(1, 2, 70, 16), states(1, 2, 70, 16, seed=1)
    step = (keys[:, :, :1], values[:, :, :1])
    for layer, prompt in enumerate(((keys, values), (values, keys))):
        cache.update(*prompt, layer)
    given_out = cache.update(*step, 0)
    copies = [one.clone() for one in given_out]
    cache.update(*step, 1)
    for _ in range(3):
        for layer in range(2):
            cache.update(*step, layer)
    assert all(torch.equal(now, was) for now, was in zip(given_out, copies))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("axis", "group", "channels"), [(-1, 64, 64), (-1, 16, 48), (-2, 8, 64), (-2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_triton_reads_what_planes_do(bits, axis, group, channels, dtype):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from layerwise.cache.triton_read import read_into

    x = states(2, 3, 40, channels)
    parts, _ = Planes(bits, axis, group).write(x)
    every = torch.full((2, 3, 72, channels), 7, dtype=dtype, device=device)
    read_into(every[:, :, :40], *(part.to(device) for part in parts), bits=bits, axis=axis, group=group)
    want = quantize(x, bits, axis=axis, group=group).values()
    got = every.float().cpu()
    exact = dtype == torch.float32
    assert torch.allclose(got[:, :, :40], want, rtol=1e-6 if exact else 2**-7, atol=1e-6)
    assert (got[:, :, 40:] == 7).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("axis", "group", "channels"), [(-1, 16, 48), (-2, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_operations_alone_read_the_same(bits, axis, group, channels, dtype):
    """What CUDA falls back to where Triton cannot be used."""
    x = states(2, 3, 40, channels)
    planes = Planes(bits, axis, group)
    parts, _ = planes.write(x)
    every = torch.full((2, 3, 72, channels), 7, dtype=dtype)
    planes.read_by_tensors(*parts, every[:, :, :40])
    assert torch.equal(every[:, :, :40], planes.read(parts, 0, every))
    assert (every[:, :, 40:] == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["per-token", "kivi"])
@pytest.mark.parametrize("pair", [(8, 4), (2, 2)])
def test_cuda_and_cpu_caches_agree(mode, pair):
    keys, values = states(2, 2, 90, 64), states(2, 2, 90, 64, seed=1)
    found = []
    for device in ("cpu", "cuda"):
        cache = QuantizedKVCache([pair], mode=mode)
        for part in (slice(0, 70), slice(70, 71), slice(71, 90)):
            got = cache.update(keys[:, :, part].to(device), values[:, :, part].to(device), 0)
        found.append((got, cache.nbytes))
    assert found[0][1] == found[1][1]
    for a, b in zip(found[0][0], found[1][0]):
        assert torch.allclose(a, b.cpu(), atol=1e-5)
