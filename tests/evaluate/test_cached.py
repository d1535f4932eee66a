"""Perplexity and divergence with a quantised KV cache."""

import pytest
import torch

from layerwise.cache import QuantizedKVCache
from layerwise.errors import ConfigError, ModelError
from layerwise.evaluate import evaluate
from layerwise.tasks import Batches
from models import MODELS, small_llama

LENGTH = 24


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=3, initializer_range=0.3)


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(3, 60, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    return Batches(tuple({"input_ids": part} for part in ids.split(2)), {"source": "random"})


def cache_of(model, keys, values, **settings):
    return QuantizedKVCache.uniform(keys, values, model.config, **{"quantize_prefill": True, **settings})


def test_sixteen_bits_cost_nothing(model, windows):
    plain = evaluate(model, windows)
    got = evaluate(model, windows, against=model, cache=cache_of(model, 16, 16))
    assert got.perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert got.dense_perplexity == plain.perplexity
    assert got.kl < 1e-9
    assert got.top1 == 1
    assert (got.cache.bits, got.cache.bytes_per_token, got.cache.plain_bytes) == (16, 3 * 2 * 16 * 2, 3 * 2 * 16 * 2)
    assert plain.cache is None


def test_fewer_bits_cost_more_and_take_less(model, windows):
    found = [evaluate(model, windows, against=model, cache=cache_of(model, bits, bits)) for bits in (8, 4, 2)]
    kl = [one.kl for one in found]
    assert 0 < kl[0] < 0.1 * kl[1] < 0.1 * kl[2]
    assert [one.cache.bits for one in found] == [12, 8, 6]  # heads of 8: two 16-bit numbers for each 8
    assert [one.cache.bytes_per_token for one in found] == [3 * 2 * 16 * bits / 8 for bits in (12, 8, 6)]
    assert found[0].protocol["kv_cache"] == "K8V8 per-token"
    assert found[0].protocol["kv_passes"] == "one pass"


def test_one_pass_is_what_token_by_token_gives(model, windows):
    cache = cache_of(model, 4, 2)
    whole, single = (evaluate(model, windows, against=model, cache=cache, step=step) for step in (None, 1))
    assert single.kl == pytest.approx(whole.kl, rel=1e-4)
    assert single.protocol["kv_passes"] == "passes of 1"
    kept = evaluate(
        model, windows, against=model, cache=cache_of(model, 4, 2, quantize_prefill=False, residual=4), step=1
    )
    assert 0 < kept.kl < whole.kl  # its own token is exact
    with pytest.raises(
        ConfigError, match=r"a window in one pass meets nothing quantised\. Make it with quantize_prefill=True"
    ):
        evaluate(model, windows, cache=cache_of(model, 4, 2, quantize_prefill=False))
    with pytest.raises(ConfigError, match=r"step=0"):
        evaluate(model, windows, cache=cache, step=0)


def test_what_stays_full_is_in_the_figures():
    model = MODELS["gemma3"]().eval()
    ids = torch.arange(3, 15)[None]
    found = evaluate(model, Batches(({"input_ids": ids},), {}), against=model, cache=cache_of(model, 4, 4))
    assert found.cache.notes[0].endswith(": full precision, not fewer bits (sliding window).")
    assert found.cache.bits < 16


class Deaf(torch.nn.Module):
    """Takes a cache and leaves it alone."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 60), "past_key_values": past_key_values})()


def test_a_model_that_ignores_the_cache_is_refused(windows):
    with pytest.raises(ModelError, match=r"Deaf does not use the KV cache that it is given"):
        evaluate(Deaf(), windows, cache=QuantizedKVCache([(4, 4)], quantize_prefill=True))


def test_the_figures_need_a_used_cache(model):
    with pytest.raises(ConfigError, match="has not been used yet"):
        cache_of(model, 4, 4).long_run()
