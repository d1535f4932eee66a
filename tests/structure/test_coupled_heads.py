"""Attentions that own more per head than is known, or whose keys other blocks read, keep all their heads and say why."""

import pytest
import torch
import transformers

from layerwise.errors import ModelError
from layerwise.shrink import drop_blocks
from layerwise.structure import coupled_groups
from models import DECODER, TEXT

_MOONSHINE = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
}
_SHARED = {
    **DECODER,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}
_GEMMA3N = {
    "intermediate_size": [64] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
_GEMMAS = [("Gemma3n", _GEMMA3N), ("Gemma4", {"global_head_dim": 8})]


def built(model, config, settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def kinds(coupling):
    return {kind: [group.name for group in coupling.groups if group.kind == kind] for kind in ("heads", "channels")}


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("StableLm", {"qk_layernorm": True}, '"q_layernorm.norms.0.weight"'),  # a norm of each head
        ("Cohere", {"use_qk_norm": True}, '"q_norm.weight"'),  # (heads, head_dim)
        ("DiffLlama", {}, '"lambda_q1"'),  # differences of pairs of heads
        ("Doge", {}, '"A"'),  # one number a key head, and a linear that reads the values of all
    ],
)
def test_what_heads_own_beside_their_rows_keeps_them_whole(family, settings, said):
    model = built(f"{family}ForCausalLM", f"{family}Config", {**DECODER, **settings})
    coupling = coupled_groups(model)
    assert kinds(coupling) == {"heads": [], "channels": ["model.layers.0.mlp", "model.layers.1.mlp"]}
    assert dict(coupling.left)["model.layers.1.self_attn"].endswith(f"how they share {said} is in no table")


@pytest.mark.parametrize("family", ["StableLm", "Cohere"])
def test_the_same_families_without_it_have_heads(family):
    assert kinds(coupled_groups(built(f"{family}ForCausalLM", f"{family}Config", DECODER)))["heads"]


def test_a_number_of_heads_that_is_read_in_the_config_keeps_them_whole():
    """It would reshape by the heads of before: a RuntimeError at the next forward pass."""
    coupling = coupled_groups(built("MoonshineForConditionalGeneration", "MoonshineConfig", _MOONSHINE))
    assert not kinds(coupling)["heads"]
    assert "in the config" in dict(coupling.left)["model.encoder.layers.0.self_attn"]


@pytest.mark.parametrize(("family", "settings"), _GEMMAS)
def test_blocks_that_read_the_keys_of_others_keep_their_heads_and_their_number(family, settings):
    """The last two of four read what the first two made: cut there, they attended to other heads without a word."""
    model = built(f"{family}ForCausalLM", f"{family}TextConfig", _SHARED | settings)
    coupling = coupled_groups(model)
    assert kinds(coupling) == {"heads": [], "channels": [f"model.layers.{index}.mlp" for index in range(4)]}
    assert "may read its keys and values" in dict(coupling.left)["model.layers.0.self_attn"]
    with pytest.raises(ModelError, match="read the keys and values of earlier ones"):
        drop_blocks(model, ["model.layers.1"])
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


@pytest.mark.parametrize(("family", "settings"), _GEMMAS)
def test_where_no_block_does_they_have_heads(family, settings):
    model = built(f"{family}ForCausalLM", f"{family}TextConfig", _SHARED | settings | {"num_kv_shared_layers": 0})
    assert len(kinds(coupled_groups(model))["heads"]) == 4
