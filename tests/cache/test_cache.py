"""The cache in `generate()` and in plain forward passes: exact where it must be, append-only, of the bytes that it says."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from caches import HEAD, KV_HEADS, LAYERS, SCHEMES, full, generate, ids, logits, schemes, states
from layerwise.cache import QuantizedKVCache, cache_bytes, quantize
from layerwise.cache.layer import QuantizedKVLayer
from layerwise.errors import StatisticsError
from models import MODELS, small_llama


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=LAYERS, initializer_range=0.3)  # large enough for predictions to differ


@schemes
def test_sixteen_bits_are_the_plain_cache(model, scheme):
    cache = QuantizedKVCache.uniform(16, 16, model.config, **scheme)
    prompt = ids(2, 9)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt, full(model)))
    ours, plain = cache.fresh(), full(model)
    for tokens in ids(2, 12, seed=1).split((7, 1, 4), dim=1):
        assert torch.equal(logits(model, tokens, ours), logits(model, tokens, plain))
    assert ours.bits_per_element == 32  # the model's own float32
    assert ours.get_seq_length() == 12


@schemes
def test_the_prompt_is_exact_unless_it_is_asked_for_quantised(model, scheme):
    prompt = ids(2, 12)
    exact = logits(model, prompt, full(model))
    assert torch.equal(logits(model, prompt, QuantizedKVCache.uniform(2, 2, model.config, **scheme)), exact)
    asked = logits(model, prompt, QuantizedKVCache.uniform(2, 2, model.config, quantize_prefill=True, **scheme))
    assert (asked - exact).abs().max() > 0.01 * exact.abs().max()


def test_fewer_bits_move_predictions_further(model):
    prompt, next_ = ids(4, 12), ids(4, 1, seed=1)
    plain = full(model)
    logits(model, prompt, plain)
    exact, errors = logits(model, next_, plain), []
    for bits in (8, 4, 2):
        cache = QuantizedKVCache.uniform(bits, bits, model.config, residual=0)
        logits(model, prompt, cache)
        errors.append((logits(model, next_, cache) - exact).abs().mean())
    assert 0 < 4 * errors[0] < errors[1]
    assert 2 * errors[1] < errors[2]


@schemes
@pytest.mark.parametrize("pair", [(8, 4), (2, 16)])
def test_a_stored_code_never_changes(scheme, pair):
    cache = QuantizedKVCache([pair], **scheme)
    before, keys, values = [[], []], *states(23)
    for start, end in ((0, 9), *((i, i + 1) for i in range(9, 19)), (19, 23)):
        cache.update(keys[:, :, start:end], values[:, :, start:end], 0)
        for side, old in zip(cache.layers[0].sides, before):
            now = side.tensors()[:-1]
            for part, was in zip(now, old):
                assert torch.equal(part[:, :, : was.shape[2]], was)
            old[:] = now
    assert before[0]
    assert bool(before[1]) == (pair[1] < 16)


@schemes
def test_what_is_stored_does_not_depend_on_how_the_tokens_come(scheme):
    keys, values = states(23)
    at_once, by_one = (QuantizedKVCache([(4, 2)], **scheme) for _ in range(2))
    at_once.update(keys, values, 0)
    for token in range(23):
        by_one.update(keys[:, :, [token]], values[:, :, [token]], 0)
    for a, b in zip(at_once.layers[0].sides, by_one.layers[0].sides):
        assert a.coded
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors()))


def test_what_is_attended_to_is_every_group_quantised_and_the_rest_as_it_was():
    (keys, values), (new_key, new_value) = states(11), states(1, seed=1)
    cache = QuantizedKVCache([(4, 2)], mode="kivi", group=4, residual=4)
    assert torch.equal(cache.update(keys, values, 0)[0], keys)
    got_keys, got_values = cache.update(new_key, new_value, 0)
    # of 11 keys 8 are whole groups of tokens; of 11 values 7 are older than the last 4, of which a group is written
    want = torch.cat([quantize(keys[:, :, :8], 4, axis=-2, group=4).values(), keys[:, :, 8:], new_key], dim=2)
    assert torch.allclose(got_keys, want, atol=1e-6)
    want = torch.cat([quantize(values[:, :, :4], 2, axis=-1, group=4).values(), values[:, :, 4:], new_value], dim=2)
    assert torch.allclose(got_values, want, atol=1e-6)
    assert [side.coded for side in cache.layers[0].sides] == [12, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_get_their_dtype_with_one_rounding(dtype):
    keys, values = (state.to(dtype) for state in states(8))
    cache = QuantizedKVCache([(8, 8)], quantize_prefill=True)
    got = cache.update(keys, values, 0)
    for ours, state in zip(got, (keys, values)):
        assert ours.dtype == dtype
        assert torch.equal(ours, quantize(state, 8).values().to(dtype))


@schemes
@pytest.mark.parametrize("pair", [(8, 8), (8, 4), (4, 2), (2, 2), (16, 4), (16, 16)])
def test_bytes_are_those_of_the_arithmetic(scheme, pair):
    pairs = [pair, (4, 4)]
    for tokens in (1, 4, 7, 21):
        cache = QuantizedKVCache(pairs, **scheme)
        whole, _ = states(2 * tokens)  # views of something longer, as a model's keys may be
        for layer in range(2):
            cache.update(whole[:, :, :tokens], whole[:, :, ::2], layer)
        for layer in range(2):
            cache.update(whole[:, :, :1], whole[:, :, :1], layer)
        want = cache_bytes(pairs, cache.scheme, tokens + 1, KV_HEADS, HEAD, batch=2, exact=4)
        assert cache.nbytes == want
        held = [part for layer in cache.layers for side in layer.sides for part in side.tensors()]
        assert (
            sum(part.untyped_storage().nbytes() for part in held) == want
        )  # what the allocator gave, not what is shown
        assert cache.bits_per_element == 8 * want / (2 * 2 * 2 * KV_HEADS * (tokens + 1) * HEAD)


def test_bytes_worked_by_hand():
    cache = QuantizedKVCache([(8, 2)], mode="kivi", group=4, residual=4)
    cache.update(*states(11, batch=1, heads=1), 0)
    # keys: 8 tokens x 8 channels of a byte, 2 x 8 groups of 4 bytes, 3 tokens of 32 bytes; values: 4 x 2 bytes, 4 x 2 groups, 7 tokens
    assert cache.nbytes == (64 + 64 + 96) + (8 + 32 + 224)


def test_every_layer_has_its_own_bits(model):
    pairs = [(16, 16), (8, 4), (2, 2)]
    cache = QuantizedKVCache(pairs, config=model.config, residual=0)
    generate(model, ids(2, 9), cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {9 + 15}  # the last token is not fed back
    assert [layer.nbytes for layer in cache.layers] == [
        cache_bytes([pair], cache.scheme, 24, KV_HEADS, HEAD, batch=2, exact=4) for pair in pairs
    ]
    assert cache.name == "K8.66667V7.33333 per-token, residual 0"


@schemes
def test_sequences_are_chosen_in_codes_and_recent_tokens_alike(scheme):
    cache = QuantizedKVCache([(4, 2)], **scheme)
    cache.update(*states(11), 0)
    one = cache.fresh()
    one.update(*states(11), 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    one.batch_repeat_interleave(2)
    one.batch_select_indices(torch.tensor([3, 2]))
    none = (torch.zeros(2, KV_HEADS, 0, HEAD),) * 2
    stored = [layer.sides[0]._joined(layer.sides[0].recent) for layer in (*cache.layers, *one.layers)]
    fresh = cache.fresh()
    fresh.update(*states(11), 0)
    want = fresh.update(*none, 0)[0][[1, 1]]
    assert torch.equal(stored[0], want)
    assert torch.equal(stored[1], want)


@schemes
def test_a_conversation_goes_on(model, scheme):
    """Quantised before they are attended to, tokens are the same whether they come at once or in turns, where nothing waits."""
    whole, settings = ids(2, 14), {"quantize_prefill": True, **scheme}
    cache = QuantizedKVCache.uniform(4, 4, model.config, **settings)
    parts = torch.cat([logits(model, part, cache) for part in whole.split((6, 1, 7), dim=1)], dim=1)
    assert cache.get_seq_length() == 14
    at_once = logits(model, whole, cache.fresh())
    assert torch.allclose(parts, at_once, atol=1e-5) == (scheme == SCHEMES["per-token"])
    first = generate(model, whole, cache := cache.fresh(), new=4)
    again = torch.cat([first, ids(2, 3, seed=2)], dim=1)
    assert torch.equal(generate(model, again, cache, new=4)[:, :21], again)
    assert cache.get_seq_length() == 24
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(generate(model, whole, cache, new=4), first)


def test_sliding_windows_stay_full():
    model = MODELS["gemma3"]().eval()
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    cache = QuantizedKVCache.uniform(4, 4, model.config)
    for kind, layer in zip(kinds, cache.layers, strict=True):
        assert isinstance(layer, QuantizedKVLayer) == (kind == "full_attention")
    assert len(cache.notes) == 1
    assert ": full precision, not fewer bits (sliding window)" in cache.notes[0]
    generate(model, ids(2, 9), cache, new=4)
    exact = QuantizedKVCache.uniform(16, 16, model.config)
    assert exact.notes == ()
    assert torch.equal(generate(model, ids(2, 9), exact, new=12), generate(model, ids(2, 9), full(model), new=12))


def test_layers_with_a_state_stay_as_they_are():
    kinds = ["full_attention", "conv", "full_attention", "conv"]
    config = AutoConfig.for_model(
        "lfm2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    cache = QuantizedKVCache.uniform(4, 2, config)
    assert [isinstance(layer, QuantizedKVLayer) for layer in cache.layers] == [True, False, True, False]
    generate(model, ids(2, 9), cache, new=4)
    assert cache.nbytes == cache_bytes([(4, 2)] * 2, cache.scheme, 12, 2, 8, batch=2, exact=4)
    exact = QuantizedKVCache.uniform(16, 16, config)
    assert torch.equal(generate(model, ids(2, 9), exact), generate(model, ids(2, 9), full(model)))


def test_what_is_no_number_is_named():
    keys, values = states(3)
    keys[0, 0, 1, 2] = float("nan")
    with pytest.raises(StatisticsError, match=r"keys of layer 0: a number is not finite, or larger than 16 bits hold"):
        QuantizedKVCache([(4, 4)], residual=0).update(keys, values, 0)
    with pytest.raises(StatisticsError, match=r"values of layer 0: .* \(65504\)"):
        QuantizedKVCache([(4, 4)], residual=0).update(values, values * 1e6, 0)


def test_gradients_stop_at_the_codes():
    keys, values = (state.requires_grad_() for state in states(3))
    cache = QuantizedKVCache([(4, 4)], residual=0)
    cache.update(keys, values, 0)
    assert cache.layers[0].sides[0].parts
    assert not any(part.requires_grad for side in cache.layers[0].sides for part in side.parts)
