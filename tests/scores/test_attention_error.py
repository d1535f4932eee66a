"""Errors of attention under a quantised cache: the worked numbers, and what the walk sees in real models."""

import copy

import pytest
import torch

from layerwise.errors import DataError, ModelError, ScoreError
from layerwise.scores import AttentionError, all_pairs, attention_errors
from layerwise.scores.attention_error import attention_output, attention_weights, pair_errors, relative_error
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama


def by_token(x, bits, which="key"):
    """Round to nearest with a float offset, one group per token and head."""
    x = x.double()  # three values of the worked example lie halfway between two codes: float32 would round them down
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((x - low) / scale).round() * scale + low).float()


QUERY = torch.tensor([1, 0, 0.5, -1]).reshape(1, 1, 1, 4)
KEY = torch.tensor([[0.1, -0.4, 0.9, 0.3], [1, 0, -1, 0.5]]).reshape(1, 1, 2, 4)
VALUE = torch.tensor([[1.0, 2, 3, 5], [0, 1, 0, -1]]).reshape(1, 1, 2, 4)


def test_the_worked_example():
    keys, values = ({bits: by_token(x, bits) for bits in (2, 4, 8)} for x in (KEY, VALUE))
    assert attention_weights(QUERY, KEY, 0.5).flatten().tolist() == pytest.approx([0.531209, 0.468791], abs=1e-6)
    assert attention_weights(QUERY, keys[2], 0.5).flatten().tolist() == pytest.approx([0.481259, 0.518741], abs=1e-6)
    rows = dict(pair_errors(QUERY, KEY, VALUE, keys, values, scaling=0.5))
    means = {pair: [float(of.mean()) for of in four] for pair, four in rows.items()}
    assert means[2, 2][2] == pytest.approx(0.049951, abs=1e-6)
    assert means[2, 2][3] == pytest.approx(0.153813, abs=1e-6)
    assert means[8, 8][3] == pytest.approx(0.002003, abs=1e-6)
    assert means[4, 2][3] == pytest.approx(0.177337, abs=1e-6)  # worse than (2, 2): not monotone in bits
    assert {pair: four[0] for pair, four in means.items()} == {  # keys err by their bits, whatever the values have
        pair: pytest.approx(float(relative_error(KEY, keys[pair[0]]).mean())) for pair in means
    }


def test_a_vector_of_zeros_does_not_divide_by_zero():
    assert relative_error(torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [3e-6, 0, 4e-6]])).tolist() == pytest.approx(
        [0, 5]
    )


def test_heads_share_keys_soft_caps_and_sinks():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (6, 2, 2))
    wide = key.repeat_interleave(3, 1)
    logits = torch.tanh(query @ wide.transpose(-1, -2) * 0.3 / 2.0) * 2.0
    sinks = torch.randn(6, generator=draw)
    expected = torch.cat([logits, sinks.reshape(1, 6, 1, 1).expand(2, 6, 5, 1)], -1).softmax(-1)[..., :-1]
    weights = attention_weights(query, key, 0.3, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(attention_output(weights, value), expected @ value.repeat_interleave(3, 1))


def test_pairs_are_listed_from_most_bits_to_fewest():
    assert all_pairs() == [(8, 8), (8, 4), (4, 8), (8, 2), (2, 8), (4, 4), (4, 2), (2, 4), (2, 2)]


CACHED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gpt_oss",
    "llama4",
    "llava",
)


@pytest.mark.parametrize("name", CACHED)
def test_every_decoder_attention_is_measured_and_the_model_untouched(name):
    model = MODELS[name]().train()
    batches = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})
    before, implementation = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    random_state = torch.get_rng_state()
    errors = attention_errors(model, batches, by_token)
    assert len(errors) == model.config.get_text_config().num_hidden_layers
    for name, of_pairs in errors.items():
        assert hasattr(model.get_submodule(name), "layer_idx")
        assert list(of_pairs) == [(k, v) for k in (2, 4, 8) for v in (2, 4, 8)]
        assert of_pairs[2, 2].key > of_pairs[4, 4].key > of_pairs[8, 8].key > 0
        assert of_pairs[2, 2].output > of_pairs[8, 8].output > 0
        assert of_pairs[2, 4].key == of_pairs[2, 8].key
        assert of_pairs[2, 4].weights == of_pairs[2, 8].weights
    assert attention_errors(model, batches, by_token) == errors
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_nothing_quantised_errs_by_nothing():
    model = small_llama()
    data = [{"input_ids": torch.arange(12).reshape(2, 6)}]
    found = attention_errors(model, data, lambda x, bits, which: x, bits=(16,))
    assert found == {f"model.layers.{index}.self_attn": {(16, 16): AttentionError(0, 0, 0, 0)} for index in range(2)}


def test_padding_counts_for_nothing_and_samples_are_weighed_by_their_tokens():
    model = small_llama()
    long, short = torch.arange(3, 15).reshape(1, 12), torch.arange(20, 28).reshape(1, 8)
    alone = [{"input_ids": long}, {"input_ids": short}]
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}]
    first, second = (attention_errors(model, data, by_token) for data in (alone, together))
    for name, of_pairs in first.items():
        for pair, error in of_pairs.items():
            assert second[name][pair].output == pytest.approx(error.output, rel=1e-4)
            assert second[name][pair].weights == pytest.approx(error.weights, rel=1e-4)
            assert second[name][pair].key == pytest.approx(error.key, rel=1e-4)


def test_the_tail_is_whose_queries_count():
    model, ids = small_llama(), torch.arange(3, 15).reshape(1, 12)
    seen = []

    def quantise(x, bits, which):
        seen.append(x.shape)
        return by_token(x, bits)

    one = attention_errors(model, [{"input_ids": ids}], quantise, bits=(2,), tail=1 / 12)
    assert set(seen) == {(1, model.config.num_key_value_heads, 12, 8)}  # keys and values of the whole sample
    assert one != attention_errors(model, [{"input_ids": ids}], by_token, bits=(2,), tail=1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bloom", "its attentions do not go through transformers' attention interface"),
        ("t5", "has an encoder"),
        ("cifar_resnet", "is no transformers model"),
        ("bert", "none of its attentions has a key-value cache"),
    ],
)
def test_models_without_the_usual_cache_are_refused_by_name(name, message):
    model = MODELS[name]()
    with pytest.raises(ModelError, match=message) as caught:
        attention_errors(model, [inputs_for(name, model, seed=0)], by_token)
    assert type(model).__name__ in str(caught.value)


def test_an_attention_of_another_kind_is_refused_by_name(monkeypatch):
    from transformers.models.llama import modeling_llama

    model, plain = small_llama(), modeling_llama.eager_attention_forward

    def other(*args, **more):
        output, weights = plain(*args, **more)
        return output * 1.1, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    with pytest.raises(ModelError, match=r'"model\.layers\.0\.self_attn": this attention does more'):
        attention_errors(model, [{"input_ids": torch.arange(6).reshape(1, 6)}], by_token)
    assert model.config._attn_implementation != "layerwise_attention_error"


def test_no_data_and_no_tokens_are_refused():
    with pytest.raises(DataError, match="needs batches"):
        attention_errors(small_llama(), [], by_token)
    with pytest.raises(DataError, match="batches of tokens"):
        attention_errors(small_llama(), [{"inputs_embeds": torch.zeros(1, 4, 16)}], by_token)


def test_an_error_that_is_not_finite_names_the_attention():
    with pytest.raises(ScoreError, match=r'"model\.layers\.0\.self_attn": an error'):
        attention_errors(
            small_llama(), [{"input_ids": torch.arange(6).reshape(1, 6)}], lambda x, bits, which: x * float("nan")
        )
