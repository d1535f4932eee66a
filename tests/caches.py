"""What the tests of the cache share: every kind of scheme, a small model's sizes, tokens, states, passes."""

import pytest
import torch
from transformers import DynamicCache

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
