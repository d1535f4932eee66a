"""Removing units equals zeroing what reads them, on every architecture that has them, at widths of each layer's own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ConfigError, ModelError
from layerwise.shrink import shrink, zero_out
from layerwise.structure.coupled import coupled_groups, numbers_of
from models import DECODER, MODELS, inputs_for, small_llama
from shrinking import drawn, outputs

HAS_HEADS = (
    "llama mistral qwen2 qwen3 qwen3_moe mixtral gemma3 phi3 gpt2 gpt_neox opt"
    " gpt_oss llama4 bert vit deit clip llava whisper"
).split()
NONE = ["cifar_resnet"]
SINGLE = ("mixtral", "qwen3_moe", "gpt_oss")  # grouped products of fused experts take no float64
EXACT = {"rtol": 0, "atol": 1e-6}  # in float64, too: transformers' norms and softmax are in float32


def wide(name, model, seed):
    """The model in float64 where it runs so, and a batch for it."""
    dtype = torch.float32 if name in SINGLE else torch.float64
    batch = inputs_for(name, model, seed=seed)
    return model.to(dtype), {key: one.to(dtype) if one.is_floating_point() else one for key, one in batch.items()}


def biased(model):
    """Random biases and scales of layers: those that start at zero, or at 1e-6, would hide a mistake."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "sinks" in name or "layer_scale" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NONE])
def test_removing_is_zeroing(name, seed):
    model, batch = wide(name, biased(MODELS[name]()), seed)
    coupling = coupled_groups(model)
    assert coupling.groups
    if name in HAS_HEADS:
        assert any(group.kind == "heads" for group in coupling.groups)
    keep = drawn(coupling, seed)
    zeroed, dense = copy.deepcopy(model), outputs(model, batch)
    zero_out(zeroed, keep)
    before = sum(parameter.numel() for parameter in model.parameters())
    expected = before - sum(
        numbers_of(model, group) * (group.units - len(keep[group.name])) for group in coupling.groups
    )
    shrink(model, keep)
    for got, wanted in zip(outputs(model, batch), outputs(zeroed, batch), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(outputs(model, batch), dense, strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    again = {group.name: group.units for group in coupled_groups(model).groups}
    assert again == {group.name: len(keep[group.name]) for group in coupling.groups}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_any_units_of_a_llama(seed):
    model, batch = wide("llama", MODELS["llama"](), 0)
    keep = drawn(coupled_groups(model), seed)
    zeroed = copy.deepcopy(model)
    zero_out(zeroed, keep)
    shrink(model, keep)
    torch.testing.assert_close(outputs(model, batch)[0], outputs(zeroed, batch)[0], **EXACT)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma3", "mixtral"])
def test_it_generates_with_a_cache_what_it_generates_without(name):
    model = MODELS[name]()
    shrink(model, drawn(coupled_groups(model), 3))
    ids = inputs_for(name, model, seed=0)["input_ids"][:1, :6]
    with_cache, without = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_numbers_of_a_unit_worked_by_hand():
    """d = 48, r = 3, h = 8: one head and 5 channels are 2 h d (1 + r) + 3 * 5 d = 3792 numbers (Adapt-Pruner, check 4)."""
    model = small_llama(
        **{**DECODER, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    )
    groups = {group.name: group for group in coupled_groups(model).groups}
    head, channel = groups["model.layers.0.self_attn"], groups["model.layers.0.mlp"]
    assert head.queries == 3
    assert numbers_of(model, head) + 5 * numbers_of(model, channel) == 3792
    model = MODELS["qwen2"]()  # d = 32, r = 2, h = 8, and biases of q, k and v
    head = coupled_groups(model)["model.layers.0.self_attn"]
    assert numbers_of(model, head) == 2 * 8 * 32 * (1 + 2) + 8 * (2 + 2)


def test_query_heads_go_with_the_key_head_that_they_read():
    model = small_llama(num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    group = coupled_groups(model)["model.layers.0.self_attn"]
    q = next(part for part in group.parts if part.parameter.endswith("q_proj.weight"))
    owner = torch.empty(48, dtype=torch.long)
    for unit, entries in enumerate(q.index):
        owner[entries] = unit
    assert owner.view(6, 8)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_other_groups_stay_whole_and_nothing_is_shared_with_the_old():
    model = MODELS["llama"]()
    untouched = model.model.layers[1].mlp.up_proj.weight
    shrink(model, {"model.layers.0.mlp": range(0, 64, 2)})
    assert model.model.layers[1].mlp.up_proj.weight is untouched
    assert model.model.layers[0].mlp.up_proj.weight.shape == (32, 32)
    assert model.model.layers[0].mlp.up_proj.out_features == model.model.layers[0].mlp.down_proj.in_features == 32
    assert model.model.layers[0].mlp.intermediate_size == 32


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"model.layers.0.mlp": []}, "Keep at least one channel"),
        ({"model.layers.0.self_attn": []}, "Keep at least one head"),
        ({"model.layers.0.mlp": [0, 0]}, "each once"),
        ({"model.layers.0.mlp": [64]}, "channels 0 to 63"),
        ({"model.layers.0.mlp": [-1]}, "channels 0 to 63"),
    ],
)
def test_units_that_are_not_there_are_refused_before_anything_is_cut(keep, said):
    model = MODELS["llama"]()
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=said):
        shrink(model, {"model.layers.1.mlp": [0], **keep})
    assert [parameter.shape for parameter in model.parameters()] == shapes


def test_a_weight_that_two_mlps_share_stays_whole_a_shared_mlp_does_not():
    """Cut for one of them the other would keep it whole, as a copy; a module in two places is one."""
    model = small_llama(num_hidden_layers=3)
    first, second, third = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    model.model.layers[2].mlp = second
    coupling = coupled_groups(model)
    assert not [group.name for group in coupling.groups if group.kind == "channels"]
    assert "is the weight of other layers, too" in dict(coupling.left)["model.layers.0.mlp"]
    model.model.layers[1].mlp = model.model.layers[2].mlp = third
    names = [group.name for group in coupled_groups(model).groups if group.kind == "channels"]
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]
    shrink(model, {"model.layers.1.mlp": range(8)})
    assert model.model.layers[2].mlp.up_proj.weight.shape[0] == 8


def test_attentions_of_unknown_form_are_named_with_the_reason():
    model = MODELS["bloom"]()
    coupling = coupled_groups(model)
    assert dict(coupling.left)["transformer.h.0.self_attention"].startswith("BloomAttention is in no table")
    with pytest.raises(ModelError, match="BloomAttention is in no table"):
        shrink(model, {"transformer.h.0.self_attention": [0]})
    with pytest.raises(ModelError, match="no attention or MLP that can be cut"):
        shrink(model, {"nothing": [0]})


def test_fused_experts_stay_at_widths_that_they_run_at():
    with pytest.raises(ConfigError, match="fused experts run at multiples of 8"):
        shrink(MODELS["mixtral"](), {"model.layers.0.mlp.experts": range(9)})


def test_training_goes_on():
    model = MODELS["llama"]()
    shrink(model, drawn(coupled_groups(model), 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = inputs_for("llama", model, seed=0)
    first = float(model(**batch, labels=batch["input_ids"]).loss)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model(**batch, labels=batch["input_ids"]).loss) < first
