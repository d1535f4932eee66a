"""What the tests of the cache share: every kind of scheme, a small model's sizes, tokens, states, passes; models of other kinds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from layerwise.randomness import generator_for

SCHEMES = {
    "per-token": {"residual": 0},
    "kivi": {"mode": "kivi", "group": 4, "residual": 4},
    "per-token, residual": {"residual": 5},
    "kivi, long residual": {"mode": "kivi", "group": 4, "residual": 10},
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
HEAD, KV_HEADS, LAYERS = 8, 2, 3  # 4 query heads: every cached head serves two


def ids(batch, tokens, seed=0):
    return torch.randint(3, 60, (batch, tokens), generator=generator_for(seed, "ids"))


def states(tokens, seed=0, batch=2, heads=KV_HEADS):
    drawn = torch.randn((2, batch, heads, tokens, HEAD), generator=generator_for(seed, "states"))
    return drawn[0] + 2, drawn[1]


def generate(model, prompt, cache, new=16, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(
        prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, **settings
    )  # fmt: skip


@torch.no_grad()
def logits(model, tokens, cache):
    return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def full(model):
    return DynamicCache(config=model.config)


TINY = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
GPT = {**TINY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
LLAMA = {
    **TINY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
ZAMBA = {
    **LLAMA, "num_key_value_heads": 4, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4,
}  # fmt: skip
FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
XGLM = {**TINY, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
CONFIGS = {
    "gptj": GPT,
    "codegen": {**GPT, "n_ctx": 64},
    "xglm": XGLM,
    "doge": LLAMA,
    "falcon_h1": {**LLAMA, **FALCON},
    "zamba": ZAMBA,
}
MINIMAX = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}  # with a cache of its own kind


def tiny(kind):
    """A model whose attention is written otherwise than Llama's, or has a state beside it; large weights, so that bits show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**CONFIGS, "minimax": MINIMAX}[kind])
        return AutoModelForCausalLM.from_config(config).eval()
