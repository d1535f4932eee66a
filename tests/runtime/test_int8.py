"""Linears in int8 on the CPU: near the linears they replace, only those meant, refusals."""

import pytest
import torch
from torch import nn

from layerwise import int8_on_cpu
from layerwise.errors import ModelError, SelectionError
from layerwise.runtime import Int8Linear
from models import small_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_near_the_linear_that_it_replaces(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 512, dtype=dtype)
    with torch.no_grad():
        dense, quick = linear(x), Int8Linear(linear.weight, linear.bias)(x)
    assert quick.dtype == dtype
    assert quick.shape == dense.shape
    error = (quick.float() - dense.float()).norm() / dense.float().norm()
    assert 0 < error < 0.03


def test_each_token_has_its_own_range():
    """One token a thousand times as large as the others leaves them as exact as they are alone."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32, bias=False), torch.randn(4, 64)
    quick = Int8Linear(linear.weight, linear.bias)
    alone = quick(x[1:])
    together = quick(torch.cat([1000 * x[:1], x[1:]]))[1:]
    torch.testing.assert_close(together, alone, rtol=0.05, atol=0.02)
    assert (together - linear(x[1:])).norm() / linear(x[1:]).norm() < 0.03


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data[1] = 0
    assert (Int8Linear(linear.weight, linear.bias)(torch.randn(2, 8))[:, 1] == 0).all()


def test_no_tokens_at_all():
    assert Int8Linear(torch.ones(4, 8), torch.ones(4))(torch.ones(2, 0, 8)).shape == (2, 0, 4)


def test_a_weight_on_the_grid_is_kept():
    """127 steps either side: rows that hold whole numbers and 127 are exact; so are inputs of 0 and 1, and tokens of zeros."""
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[127.0, -3.0, 5.0, 0.0]])
    assert Int8Linear(linear.weight, linear.bias)(torch.tensor([[0.0, 1.0, 1.0, 1.0]])).item() == pytest.approx(
        2, abs=1e-5
    )
    assert Int8Linear(linear.weight, linear.bias)(torch.zeros(1, 4)).item() == 0


def test_a_language_model_without_its_head():
    model = small_llama(hidden_size=64, intermediate_size=96)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        dense = model(ids).logits
        assert int8_on_cpu(model) is model
        quick = model(ids).logits
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert sum(kind is Int8Linear for kind in kinds.values()) == 14
    assert kinds["lm_head"] is nn.Linear
    assert 0 < (quick - dense).norm() / dense.norm() < 0.05
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_a_state_dict_has_the_rounded_weights_in_their_dtype():
    model = small_llama(hidden_size=64, intermediate_size=96, attention_bias=True).bfloat16()
    names, weight = list(model.state_dict()), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    state = int8_on_cpu(model).state_dict()
    assert list(state) == names
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    got = state["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (got - weight).abs().max() < 0.02 * weight.abs().max()


def test_shared_weights_stay():
    model = small_llama(tie_word_embeddings=True)
    int8_on_cpu(model, exclude=())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_refusals():
    with pytest.raises(SelectionError, match="no linear to replace"):
        int8_on_cpu(small_llama(), exclude=["*"])
    with pytest.raises(ModelError, match="not on the CPU"):
        int8_on_cpu(small_llama().to("meta"))
