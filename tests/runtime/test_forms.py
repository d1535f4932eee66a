"""Every form against the dense product: exact up to the order of summation, whatever the shape; bytes; what it refuses."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from layerwise.errors import ModelError, ShapeError
from layerwise.runtime import BsrLinear, CsrLinear, GatherLinear, Int8Linear, NarrowLinear, TwoFourLinear, zeros_of
from layerwise.runtime.candidates import why_not_two_four

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
FORMS = [NarrowLinear, GatherLinear, CsrLinear]


def blocky(rows, columns, height, width, density, *, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // height), -(-columns // width), generator=draw) < density
    kept = kept.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    return (torch.randn(rows, columns, generator=draw, dtype=torch.float64) * kept).to(dtype)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    height=st.sampled_from([1, 4, 16, 100]),
    width=st.sampled_from([1, 3, 16, 100]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    batch=st.sampled_from([(), (1,), (2, 3), (17,), (0, 5)]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_exact_in_float64(rows, columns, height, width, density, batch, bias, seed):
    weight = blocky(rows, columns, height, width, density, seed=seed, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, columns, generator=draw, dtype=torch.float64)
    offset = torch.randn(rows, generator=draw, dtype=torch.float64) if bias else None
    for form in FORMS:
        made = form(weight, offset)
        torch.testing.assert_close(made(x), F.linear(x, weight, offset), rtol=1e-12, atol=1e-12)
        assert torch.equal(made.dense(), weight)


@given(st.sampled_from([8, 16]), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_blocks_exact_in_float64(side, down, across, seed):
    weight = blocky(side * down, side * across, side, side, 0.4, seed=seed, dtype=torch.float64)
    x = torch.randn(3, side * across, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = BsrLinear(weight, None, side)
    torch.testing.assert_close(made(x), F.linear(x, weight), rtol=1e-12, atol=1e-12)
    assert torch.equal(made.dense(), weight)


@pytest.mark.parametrize("batch", [1, 7, 8, 16, 200])
@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_block_products_of_the_lpvit_sheet(side, density, batch):
    weight = blocky(192, 256, side, side, density)
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(1))
    for form in (BsrLinear, GatherLinear):
        made = form(weight, None)
        assert (made(x) - F.linear(x, weight)).abs().max() < 1e-3
    assert made.height >= side  # chance may make larger groups as good


@pytest.mark.parametrize("batch", [1, 16, 70])
def test_csr_has_short_indices_and_equals_the_zeros(batch):
    weight, x = blocky(96, 80, 1, 1, 0.2), torch.randn(batch, 80)
    made = CsrLinear(weight, None)
    assert made.matrix.crow_indices().dtype == made.matrix.col_indices().dtype == torch.int32
    assert (made(x) - F.linear(x, weight)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 16])
def test_half_precision_is_cast_where_there_is_no_kernel(dtype, form, batch):
    weight, x = blocky(64, 96, 4, 1, 0.3, dtype=dtype), torch.randn(batch, 96).to(dtype)
    bias = torch.randn(64).to(dtype)
    result, exact = form(weight, bias)(x), F.linear(x.float(), weight.float(), bias.float())
    assert result.dtype == dtype
    assert (result.float() - exact).norm() / exact.norm() < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    if form is CsrLinear:
        assert form(weight, None).matrix.dtype == torch.float32


def test_a_layer_of_zeros_is_its_bias():
    bias = torch.arange(5.0)
    for form in FORMS:
        assert torch.equal(form(torch.zeros(5, 7), bias)(torch.randn(3, 7)), bias.expand(3, 5))


def test_what_is_left_out_does_not_see_what_is_not_finite():
    """A zero weight times infinity: a dense product gives NaN, a form that has no such weight nothing. Documented."""
    weight = torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[2.0, float("inf")]])
    assert F.linear(x, weight).isnan().all()
    for form in FORMS:
        assert form(weight, None)(x).item() == 2


# --- bytes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_bytes_of_csr_are_eight_a_weight_and_the_rows(density, tmp_path):
    weight = blocky(300, 200, 1, 1, density)
    made = CsrLinear(weight, None)
    assert made.bytes == 8 * int((weight != 0).sum()) + 4 * 301
    save_file(made.parts(), tmp_path / "csr.safetensors")
    overhead = 8 + int.from_bytes((tmp_path / "csr.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "csr.safetensors").stat().st_size - overhead == made.bytes
    assert (tmp_path / "csr.safetensors").stat().st_size == pytest.approx(made.bytes, rel=0.1)


def test_bytes_of_csr_match_the_file_within_a_percent(tmp_path):
    made = CsrLinear(blocky(512, 512, 1, 1, 0.5), None)
    save_file(made.parts(), tmp_path / "csr.safetensors")
    assert (tmp_path / "csr.safetensors").stat().st_size == pytest.approx(made.bytes, rel=0.01)


def test_bytes_of_two_of_four_are_nine_sixteenths():
    """Half the values and 2 bits of index for each of them; counted in what PyTorch's converter for CUTLASS makes, which runs anywhere."""
    weight = torch.randn(64, 128).half()
    weight[:, ::2] = 0
    values, index = sparse_semi_structured_from_dense_cutlass(weight)
    stored = values.numel() * values.element_size() + index.numel() * index.element_size()
    assert stored == 0.5625 * weight.numel() * weight.element_size()


@pytest.mark.parametrize("form", [NarrowLinear, GatherLinear, BsrLinear])
def test_bytes_are_those_of_the_kept_blocks_and_indices(form):
    weight = torch.zeros(64, 64)
    weight[16:32, 32:48] = 1
    made = form(weight, None)
    kept = 16 * 16 * 4
    indices = {NarrowLinear: 2 * 16 * 8, GatherLinear: 4 + 64 * 4, BsrLinear: 5 * 4 + 4}[form]
    assert made.bytes == kept + indices
    assert f"{made.bytes:,} bytes instead of 16,384" in repr(made)


# --- a module among modules ---------------------------------------------------------------------------------------------------------


def test_a_form_stays_where_it_was_made():
    made = nn.Sequential(CsrLinear(blocky(8, 8, 1, 1, 0.5), None))
    assert made.to("cpu").to(torch.float32) is made
    with pytest.raises(ModelError, match=r"CsrLinear was made for torch\.float32 on cpu"):
        made.half()
    with pytest.raises(ModelError, match="call fastest again"):
        made.to("meta")


def test_a_form_is_saved_as_the_layer_that_it_stands_for():
    weight, bias = blocky(8, 12, 4, 1, 0.4), torch.randn(8)
    for form in (*FORMS,):
        state = nn.Sequential(form(weight, bias)).state_dict()
        assert list(state) == ["0.weight", "0.bias"]
        assert torch.equal(state["0.weight"], weight)
        assert torch.equal(copy.deepcopy(form(weight, bias)).weight, weight)


@pytest.mark.parametrize("form", [*FORMS, Int8Linear])
@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("bias", [None, torch.randn(32)])
def test_under_autocast_it_computes_in_its_own_dtype_and_gives_that_of_a_linear(form, batch, bias):
    weight = blocky(32, 64, 16, 16, 0.5)
    weight[16:] = 0
    made, linear = form(weight, bias), nn.Linear(64, 32, bias=bias is not None)
    x = torch.randn(batch, 64)
    alone = made(x)
    linear.weight.data = weight
    with torch.autocast("cpu", torch.bfloat16):
        got = made(x)
        assert got.dtype == linear(x).dtype == torch.bfloat16
        assert torch.equal(made(x.bfloat16()), made(x.bfloat16().float()))
    assert torch.equal(got, alone.bfloat16())
    wide = form(weight.double(), None)
    if form is not Int8Linear:
        with torch.autocast("cpu", torch.bfloat16):
            assert wide(x.double()).dtype == torch.float64


def test_a_weight_that_is_set_must_be_the_one_that_there_is():
    weight = blocky(8, 12, 4, 1, 0.4)
    for form in FORMS:
        made = form(weight, None)
        made.weight = nn.Parameter(weight.clone())
        assert torch.equal(made.weight, weight)
        assert not list(made.parameters())
        for wrong in (nn.Parameter(2 * weight), nn.Parameter(weight[:4]), None):
            with pytest.raises(ModelError, match=f"{form.__name__} was made for another weight"):
                made.weight = wrong


def test_no_gradient_is_kept():
    x = torch.randn(9, 12, requires_grad=True)
    assert all(not form(blocky(8, 12, 4, 1, 0.4), None)(x).requires_grad for form in FORMS)


# --- 2:4 ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_pytorch_has_no_two_of_four_on_a_cpu(dtype):
    weight = torch.ones(64, 128)
    weight[:, ::2] = 0
    with warnings.catch_warnings(), pytest.raises((RuntimeError, NotImplementedError)):
        warnings.simplefilter("ignore")
        torch.sparse.to_sparse_semi_structured(weight.to(dtype))
    assert why_not_two_four(weight.to(dtype)) == "2:4 has kernels on CUDA only, and none on cpu"


def test_a_matrix_that_is_not_two_of_four_never_reaches_the_converter():
    with pytest.raises(ShapeError, match="more than 2 weights"):
        TwoFourLinear(torch.ones(32, 64), None)
    assert why_not_two_four(torch.ones(32, 64)) == "not 2:4"
    assert why_not_two_four(torch.zeros(32, 6)) == "6 inputs do not divide by 4"


class Elsewhere:
    """As much of a CUDA matrix as the question needs."""

    device, ndim = torch.device("cuda"), 2

    def __init__(self, rows, columns, dtype):
        self.zeros = zeros_of(torch.zeros(rows, columns))
        self.dtype = dtype


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "expected"),
    [
        (64, 64, torch.float16, None),
        (40, 64, torch.float16, "multiples of 16 x 16"),
        (64, 36, torch.bfloat16, "multiples of 16 x 16"),
        (48, 64, torch.int8, "multiples of 32 x 32"),
        (64, 64, torch.float32, "no kernel for float32"),
    ],
)
def test_multiples_that_two_of_four_needs(monkeypatch, rows, columns, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    matrix = Elsewhere(rows, columns, dtype)
    found = why_not_two_four(matrix, matrix.zeros)
    assert found is None if expected is None else expected in found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    matrix = Elsewhere(64, 64, torch.float16)
    assert "Ampere" in why_not_two_four(matrix, matrix.zeros)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("batch", [1, 16, 300])
def test_forms_on_cuda(batch):
    weight = blocky(128, 256, 16, 16, 0.4)
    x = torch.randn(batch, 256, device="cuda", dtype=torch.bfloat16)
    two = torch.randn(128, 256)
    two[:, ::4] = two[:, 1::4] = 0
    made = [(form, weight) for form in (*FORMS, BsrLinear)] + [(TwoFourLinear, two)]
    for form, matrix in made:
        matrix = matrix.to("cuda", torch.bfloat16)
        exact = F.linear(x.float(), matrix.float())
        assert (form(matrix, None)(x).float() - exact).norm() / exact.norm() < 2e-2
