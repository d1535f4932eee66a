"""Sequences beside each other, and tokens that are taken back: padding, beams, drafts."""

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from caches import HEAD, LAYERS, full, generate, ids, logits, schemes, states
from layerwise.cache import QuantizedKVCache, quantize
from models import small_llama


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=LAYERS, initializer_range=0.3)  # large enough for predictions to differ


def scores(model, prompt, cache, mask):
    """(batch, 16, vocabulary): of the tokens 3, 4, ..., whatever would have been predicted, so that rows stay comparable."""
    every = []
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        for step in range(16):
            found = model(input_ids=prompt, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True)
            every.append(found.logits[:, -1])
            prompt = torch.full_like(prompt[:, :1], 3 + step)
            mask, at = torch.cat([mask, torch.ones_like(prompt)], dim=1), at[:, -1:] + 1
    return torch.stack(every, dim=1)


@pytest.mark.parametrize(
    ("residual", "padding", "alike"), [(4, 4, True), (0, 1, True), (0, 3, True), (0, 7, True), (8, 3, False)]
)
@pytest.mark.parametrize("first", [False, True])
def test_a_batch_padded_on_the_left_is_each_sequence_by_itself(model, residual, padding, alike, first):
    """Groups of a token do not mix tokens, so padding changes nothing but which tokens wait: none where each is written at once, the
    same where the padding is a multiple of those that are written together."""
    short = ids(1, 9, seed=1)
    long = ids(1, 9 + padding)
    prompt = torch.cat([long, torch.cat([torch.zeros(1, padding, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    cache = QuantizedKVCache.uniform(2, 2, model.config, residual=residual, quantize_prefill=first)
    both, alone = scores(model, prompt, cache, mask), scores(model, short, cache.fresh(), torch.ones_like(short))
    assert torch.allclose(both[1], alone[0], atol=1e-4) == alike
    assert torch.allclose(both[0], scores(model, long, cache.fresh(), torch.ones_like(long))[0], atol=1e-4)


class Recomputed(DynamicLayer):
    """Every token as it is, in the order that transformers gives them; what is due is quantised anew whenever it is asked for."""

    def __init__(self, pair, scheme):
        super().__init__()
        self.grids = tuple(zip(pair, (scheme.keys(HEAD), scheme.values(HEAD))))

    def update(self, key_states, value_states, *args, **kwargs):
        past, found = self.get_seq_length(), []
        for (bits, grid), every in zip(self.grids, super().update(key_states, value_states)):
            due = grid.quantized(past)
            coded = (
                quantize(every[:, :, :due], bits, axis=grid.axis, group=grid.group).values() if due else every[:, :, :0]
            )
            found.append(torch.cat([coded, every[:, :, due:]], dim=2))
        return tuple(found)


class Unordered(Recomputed):
    def reorder_cache(self, beam_idx):
        """What a cache must not do."""


@schemes
def test_beam_search(model, scheme):
    prompt = ids(2, 9)
    exact, few = (QuantizedKVCache.uniform(*bits, model.config, **scheme) for bits in ((16, 16), (4, 2)))

    def beams(cache):
        # warm, so that beams of near scores overtake each other
        return generate(model, prompt, cache, num_beams=4, logits_processor=[lambda _, found: found / 20])

    assert torch.equal(beams(exact), beams(full(model)))
    found = beams(few)
    recomputed, unordered = (
        Cache(layers=[kind((4, 2), few.scheme) for _ in range(LAYERS)]) for kind in (Recomputed, Unordered)
    )
    assert torch.equal(found, beams(recomputed))
    assert not torch.equal(found, beams(full(model)))  # so the bits do matter here
    assert not torch.equal(found, beams(unordered))  # and so does the order


@schemes
@pytest.mark.parametrize("first", [False, True])
def test_tokens_just_added_can_be_taken_back_without_a_trace(scheme, first):
    keys, values = states(20)
    plain, tried = (QuantizedKVCache([(4, 2)], quantize_prefill=first, **scheme) for _ in range(2))
    plain.update(keys[:, :, :9], values[:, :, :9], 0)
    tried.update(keys[:, :, :9], values[:, :, :9], 0)
    tried.activate_past_recording()
    for start, end, kept in ((9, 14, 11), (11, 17, 11), (11, 18, 18)):
        drafted = 100 * torch.ones_like(keys[:, :, kept:end])  # they would stretch every scale that they had a part in
        tried.update(*(torch.cat([one[:, :, start:kept], drafted], dim=2) for one in (keys, values)), 0)
        tried.crop(kept - end)
        assert tried.get_seq_length() == kept
    plain.update(keys[:, :, 9:18], values[:, :, 9:18], 0)
    for a, b in zip(plain.layers[0].sides, tried.layers[0].sides):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@schemes
@pytest.mark.parametrize("first", [False, True])
def test_drafts_that_are_rejected_change_no_prediction(model, scheme, first):
    """Token by token, with drafts behind each that are taken back, and without: as long as no draft is longer than what may wait."""
    plain = QuantizedKVCache.uniform(4, 4, model.config, quantize_prefill=first, **scheme)
    drafted, whole = plain.fresh(), ids(1, 30)
    for cache in (plain, drafted):
        logits(model, whole[:, :9], cache)
    drafted.activate_past_recording()
    for token in range(9, 30):
        more = 0 if token % 5 == 0 else token % 4
        tried = torch.cat([whole[:, [token]], ids(1, more, seed=token)], dim=1)
        got = logits(model, tried, drafted)[:, 0]
        drafted.crop(-more)
        assert torch.allclose(got, logits(model, whole[:, [token]], plain)[:, 0], atol=1e-5)


def test_assisted_decoding_is_greedy_decoding(model):
    prompt = ids(1, 4).repeat(1, 3)  # something to look up
    cache = QuantizedKVCache.uniform(4, 4, model.config, quantize_prefill=True)
    want = generate(model, prompt, cache.fresh(), new=20)
    assert torch.equal(generate(model, prompt, cache, new=20, prompt_lookup_num_tokens=3), want)
    exact = QuantizedKVCache.uniform(16, 16, model.config)
    assert torch.equal(
        generate(model, prompt, exact, new=20, prompt_lookup_num_tokens=3), generate(model, prompt, full(model), new=20)
    )


def test_cropping_into_a_group_of_tokens_leaves_its_rest_as_it_was_read():
    keys, values = states(11)
    cache = QuantizedKVCache([(4, 4)], mode="kivi", group=4, residual=4)
    cache.update(keys, values, 0)
    cache.crop(-5)  # 6 tokens: one whole group of keys, and two tokens of the second
    side = cache.layers[0].sides[0]
    assert (side.coded, side.recent.shape[2]) == (4, 2)
    assert torch.allclose(side.recent, quantize(keys[:, :, 4:8], 4, axis=-2, group=4).values()[:, :, :2])
    assert (cache.layers[0].sides[1].coded, cache.layers[0].sides[1].tokens) == (4, 6)
    cache.crop(-3)
    assert [side.coded for side in cache.layers[0].sides] == [0, 3]  # a token's values have scales of their own
    codes = cache.layers[0].sides[1].parts[0]
    cache.update(keys[:, :, :6], values[:, :, :6], 0)
    assert [side.tokens for side in cache.layers[0].sides] == [9, 9]
    assert torch.equal(cache.layers[0].sides[1].parts[0][:, :, :3], codes)
    cache.crop(-3)
    cache.crop(-6)
    assert cache.get_seq_length() == cache.nbytes == 0
