"""A linear in factors: the numbers of its product in every dtype, patterns checked, copies, training, put in the place of others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from factors import drawn
from layerwise.errors import ModelError, ShapeError
from layerwise.io import ArmorLinear, armor_linears, fastest_cores, multiplied_out
from layerwise.io.armor_linear import check_pattern, factored, put_back, unfactorable, why_dense

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("rows", "columns", "block", "nm"),
    [(16, 32, 8, (2, 4)), (32, 16, 16, (1, 4)), (8, 12, 4, (3, 4)), (6, 8, 1, (2, 4))],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1,), (5,), (2, 3)])
def test_forward_is_that_of_the_product(rows, columns, block, nm, bias, tokens):
    factors = drawn(rows, columns, block, n=nm[0], m=nm[1])
    added = torch.randn(rows) if bias else None
    module, x = ArmorLinear(factors, added), torch.randn(*tokens, columns)
    wanted = linear(x, factors.weight(), added)
    assert module(x).shape == wanted.shape
    torch.testing.assert_close(module(x), wanted, atol=1e-5 * float(wanted.detach().abs().max()), rtol=1e-5)
    torch.testing.assert_close(module.weight, factors.weight())
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted, atol=1e-5 * float(wanted.detach().abs().max()), rtol=1e-5)
    with torch.inference_mode():
        assert copy.deepcopy(module)(x).shape == wanted.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_in_and_out_and_other_inputs_are_cast(dtype):
    factors = drawn(16, 32, 8, dtype)
    module, x = ArmorLinear(factors).eval(), torch.randn(4, 32)
    wanted = linear(x, factors.weight())
    for given in (x, x.to(dtype)):
        got = module(given).detach()
        assert got.dtype == given.dtype
        assert float((got.float() - wanted).norm() / wanted.norm()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert module.kernel.startswith("dense: no semi-structured kernels on cpu")


def test_the_core_is_made_once_and_anew_when_the_values_change():
    module, x = ArmorLinear(drawn(8, 8, 4)), torch.randn(2, 8)
    with torch.no_grad():
        before = module(x)
        first = module._core()[0]
        assert module._core()[0] is first
        module.values.mul_(2)
        assert module._core()[0] is not first
        torch.testing.assert_close(module(x), 2 * before)
        module.values = nn.Parameter(module.values / 2)  # another tensor, wherever it comes to lie
        torch.testing.assert_close(module(x), before)
        module.double()
        assert module(x.double()).dtype == torch.float64


def test_copies_and_state_dicts_are_the_module():
    module, x = ArmorLinear(drawn(8, 8, 4), torch.randn(8)), torch.randn(2, 8)
    assert list(module.state_dict()) == ["left", "values", "right", "bias", "bits"]
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(copy.deepcopy(module)(x), wanted)
        other = ArmorLinear(drawn(8, 8, 4, seed=1), torch.zeros(8))
        assert not torch.equal(other(x), wanted)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), wanted)
    assert "2:4, block=4" in repr(module)


def test_factors_can_be_trained_and_what_is_pruned_stays_so():
    module, x = ArmorLinear(drawn(8, 8, 4)), torch.randn(6, 8)
    reference = [one.detach().clone().requires_grad_() for one in (module.left, module.factors.core(), module.right)]
    module(x).square().sum().backward()
    weight = torch.block_diag(*reference[0]) @ reference[1] @ torch.block_diag(*reference[2])
    linear(x, weight).square().sum().backward()
    torch.testing.assert_close(module.left.grad, reference[0].grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.right.grad, reference[2].grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        module.values.grad.flatten(), reference[1].grad[module.factors.keep], rtol=1e-4, atol=1e-3
    )
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert int((module.factors.core() != 0).sum()) == 32


def test_patterns_are_checked_before_any_kernel_sees_them():
    core = drawn(32, 64, 4).core()
    check_pattern(core)
    emptier = core.clone()
    emptier[0, :8] = 0  # groups of none and of one will do
    emptier[1, :3] = 0
    check_pattern(emptier)
    crowded = core.clone()
    crowded[0, :4] = 1
    with pytest.raises(ShapeError, match="1 groups of 4 have more than 2 non-zeros"):
        check_pattern(crowded)
    with pytest.raises(ShapeError, match="no contiguous matrix"):
        check_pattern(core.T)
    with pytest.raises(ShapeError, match="in groups of 4"):
        check_pattern(torch.zeros(4, 6))
    with pytest.raises(ShapeError, match="this is no 2:4 core"):
        why_dense(crowded)
    assert why_dense(core) == "no semi-structured kernels on cpu"


def test_torch_has_no_such_kernels_on_a_cpu_so_none_is_asked_for():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.sparse.to_sparse_semi_structured(drawn(32, 64, 4, torch.float16).core())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_sparse_kernels_give_the_numbers_of_the_product(dtype, tokens):
    factors = drawn(128, 256, 32, dtype).to("cuda")
    module, x = ArmorLinear(factors).cuda().eval(), torch.randn(tokens, 256, device="cuda", dtype=dtype)
    wanted = linear(x.float(), factors.weight())
    with torch.no_grad():
        assert module.kernel == "semi-structured"
        assert float((module(x).float() - wanted).norm() / wanted.norm()) < 2e-2
    assert ArmorLinear(drawn(128, 256, 32).to("cuda")).kernel == "dense: float32 is not a 16-bit float"
    assert "multiples" in ArmorLinear(drawn(8, 8, 4, dtype).to("cuda")).kernel
    kept = fastest_cores(nn.Sequential(module), tokens)["0"]
    assert kept in ("semi-structured", "dense: faster so, as measured")
    with torch.no_grad():
        assert float((module(x).float() - wanted).norm() / wanted.norm()) < 2e-2


def test_the_faster_of_both_ways_is_kept_and_nothing_is_timed_without_kernels(monkeypatch):
    from layerwise.io import armor_linear

    model, x = nn.Sequential(ArmorLinear(drawn(8, 8, 4)), ArmorLinear(drawn(8, 8, 4, seed=1))).eval(), torch.randn(2, 8)
    wanted = model(x)
    timed = []
    monkeypatch.setattr(armor_linear, "_seconds", lambda core, rows: timed.append((core, rows)) or len(timed))
    assert set(fastest_cores(model, 4).values()) == {"dense: no semi-structured kernels on cpu"}
    assert not timed
    monkeypatch.setattr(armor_linear, "why_dense", lambda core, n, m: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda core: core.clone())
    assert fastest_cores(model, 4) == {
        "0": "semi-structured",
        "1": "semi-structured",
    }  # the first took 1, the dense one 2
    assert [rows for _, rows in timed] == [4, 4]  # one shape
    slower = iter([2.0, 1.0])
    monkeypatch.setattr(armor_linear, "_seconds", lambda core, rows: next(slower))
    assert set(fastest_cores(model, 1).values()) == {"dense: faster so, as measured"}
    torch.testing.assert_close(model(x), wanted)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), Conv1D(8, 16), nn.Linear(8, 4, bias=False)
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.three.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.one(x), self.two(x.repeat(1, 2))


def test_linears_and_conv1d_are_replaced_and_put_back():
    model, x = Two().eval(), torch.randn(3, 8)
    before = model(x)
    factors = {"one": drawn(8, 8, 4), "two": drawn(8, 16, 4)}
    replaced = factored(model, factors)
    one, two = model(x)
    torch.testing.assert_close(one, linear(x, factors["one"].weight(), replaced["one"].bias), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        two, linear(x.repeat(1, 2), factors["two"].weight(), replaced["two"].bias), atol=1e-4, rtol=1e-4
    )
    assert list(armor_linears(model)) == ["one", "two"]
    dense = multiplied_out(copy.deepcopy(model))
    assert not armor_linears(dense)
    torch.testing.assert_close(dense(x)[1], two, atol=1e-4, rtol=1e-4)
    put_back(model, replaced)
    assert all(torch.equal(a, b) for a, b in zip(model(x), before))


def test_what_cannot_be_in_factors_is_said_and_the_model_unchanged():
    model = Two()
    reasons = unfactorable(model, ["one", "three", "norm", "nine"])
    assert list(reasons) == ["three", "norm", "nine"]
    assert "shares its weight" in reasons["three"]
    assert "is a LayerNorm" in reasons["norm"]
    assert "no module" in reasons["nine"]
    with pytest.raises(ModelError, match=r'factors of "two" are \[16, 8\], its weight is \[8, 16\]'):
        factored(model, {"one": drawn(8, 8, 4), "two": drawn(16, 8, 4)})
    assert not armor_linears(model)
