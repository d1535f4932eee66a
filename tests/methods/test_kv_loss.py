"""The loss of a quantised cache: the same as passing the cache by hand, nothing for 16 bits, both kinds of prefill."""

import pytest
import torch
from transformers import DynamicCache

from layerwise.cache import QuantizedKVCache
from layerwise.errors import DataError
from layerwise.methods.kv_loss import Cached, Divergence
from layerwise.randomness import generator_for
from models import small_llama


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=3, initializer_range=0.3)


def batches(count=2, rows=2, tokens=12):
    return [
        {"input_ids": torch.randint(3, 60, (rows, tokens), generator=generator_for(index, "ids"))}
        for index in range(count)
    ]


def cache(model, bits, prefill=True):
    return lambda: QuantizedKVCache.uniform(bits, bits, model.config, residual=0, quantize_prefill=prefill)


def by_hand(full, other):
    return (full.exp() * (full - other)).sum(-1).flatten().double()


@torch.no_grad()
def test_quantized_prefill_is_one_pass_with_the_cache(model):
    data = batches()
    rows = Divergence()(model, cache(model, 2), data)
    expected = [
        by_hand(
            model(**batch, use_cache=False).logits.log_softmax(-1),
            model(**batch, past_key_values=cache(model, 2)()).logits.log_softmax(-1),
        )
        for batch in data
    ]
    torch.testing.assert_close(rows, torch.cat(expected).clamp_min(0), atol=1e-6, rtol=1e-4)
    assert rows.mean() > 0.01
    assert Divergence()(model, cache(model, 8), data).mean() < rows.mean() / 50


@torch.no_grad()
def test_exact_prefill_judges_the_second_half_alone(model):
    data = batches()
    rows = Divergence("exact")(model, cache(model, 2, False), data)
    assert rows.shape == (2 * 2 * 6,)
    expected = []
    for batch in data:
        outputs = []
        for past in (DynamicCache(config=model.config), cache(model, 2, False)()):
            model(input_ids=batch["input_ids"][:, :6], past_key_values=past)
            outputs.append(model(input_ids=batch["input_ids"][:, 6:], past_key_values=past).logits.log_softmax(-1))
        expected.append(by_hand(*outputs))
    torch.testing.assert_close(rows, torch.cat(expected).clamp_min(0), atol=1e-6, rtol=1e-4)
    assert rows.mean() > 0.01


@pytest.mark.parametrize("prefill", ["quantized", "exact"])
def test_sixteen_bits_lose_nothing(model, prefill):
    assert Divergence(prefill)(model, cache(model, 16), batches()).max() < 1e-9


def test_other_batches_get_a_yardstick_of_their_own(model):
    measure, some, others = Divergence(), batches(2), batches(4)[2:]
    first = measure(model, cache(model, 2), some)
    assert not torch.equal(measure(model, cache(model, 2), others), first)
    assert torch.equal(measure(model, cache(model, 2), some), first)


def test_padding_is_not_judged_and_labels_are_not_read(model):
    batch = batches(1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 8:] = 0
    data = [{**batch, "attention_mask": mask, "labels": batch["input_ids"]}]
    assert Divergence()(model, cache(model, 2), data).shape == (12 + 8,)
    assert Cached(model, cache(model, 2))(**data[0]).loss is None
    with pytest.raises(DataError, match="without padding"):
        Divergence("exact")(model, cache(model, 2), data)
    with pytest.raises(DataError, match="two tokens or more"):
        Divergence("exact")(model, cache(model, 2), [{"input_ids": batch["input_ids"][:, :1]}])
