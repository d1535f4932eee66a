import copy
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
from layerwise.errors import ConfigError, DataError, ModelError, ScoreError
from layerwise.evaluate import divergence, evaluate, perplexity
from layerwise.evaluate import logits as logits_module
from layerwise.tasks import Batches, held_out
from models import small_llama


def tiny_llama(seed=0, **settings):
    model = small_llama(seed, vocab_size=50, **settings)
    for parameter in model.parameters():  # the default start is so flat that every perplexity would be near 50
        parameter.data.mul_(8.0)
    return model


def windows(length, batch=1, tokens=1000, tail=False, vocabulary=50):
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    whole, rest = ids[: tokens // length * length].reshape(-1, length), ids[tokens // length * length :]
    groups = [{"input_ids": group} for group in whole.split(batch)]
    groups += [{"input_ids": rest[None]}] if tail and len(rest) else []
    return Batches(tuple(groups), {"source": "random", "length": length})


class Fixed(nn.Module):
    """Gives the same logits whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


class Losses(nn.Module):
    """A model whose loss on the given tokens is exactly as wanted: targets 1, 2, 3 ... of a vocabulary of 4."""

    def __init__(self, losses):
        super().__init__()
        self.table = nn.Parameter(losses)  # (vocabulary, length - 1): loss by first token and position

    def forward(self, input_ids):
        length = input_ids.shape[1]
        out = torch.zeros(*input_ids.shape, 2)
        for row, ids in enumerate(input_ids):
            for position in range(length - 1):
                # two tokens: log p(target) = -loss
                probability = torch.exp(-self.table[ids[0], position])
                out[row, position, ids[position + 1]] = torch.log(probability)
                out[row, position, 1 - ids[position + 1]] = torch.log1p(-probability)
        return out


def test_worked_by_hand():
    # losses (1, 2) and (0.5, 1.5): exp(mean 1.25) = 3.490343; a sum over 2 divided by 3 would give 2.300976
    model = Losses(torch.tensor([[1.0, 2.0], [0.5, 1.5]]))
    data = Batches(({"input_ids": torch.tensor([[0, 1, 1], [1, 0, 0]])},), {})
    got = perplexity(model, data)
    assert got.value == pytest.approx(3.490343, abs=1e-5)
    assert got.nll == pytest.approx(1.25)
    assert (got.tokens, got.windows) == (4, 2)


def test_uneven_batches_do_not_weigh_more():
    # window losses 2,2,2,2,8 in batches of 2: exp(3.2) = 24.53, not the 54.60 of a mean of batch means
    model = Losses(torch.tensor([[2.0], [8.0]]))
    rows = torch.tensor([[0, 1], [0, 0], [0, 1], [0, 1], [1, 0]])
    data = Batches(tuple({"input_ids": group} for group in rows.split(2)), {})
    assert perplexity(model, data).value == pytest.approx(math.exp(3.2), rel=1e-4)


@pytest.mark.parametrize("length", [2, 7, 64])
@pytest.mark.parametrize("convention", ["standard", "all"])
def test_a_uniform_model_has_its_vocabulary_as_perplexity(length, convention):
    got = perplexity(Fixed(torch.full((50,), 3.0)), windows(length, tail=True), convention=convention)
    assert got.value == pytest.approx(50, rel=1e-6)


def test_definition_on_a_real_model():
    model, length = tiny_llama(), 64
    got = perplexity(model, windows(length, tail=True))
    assert (got.windows, got.tokens) == (15, 945)
    with torch.no_grad():
        ids = torch.cat([one["input_ids"] for one in windows(length)])
        losses = [model(row[None], labels=row[None]).loss for row in ids]
        log_p = model.double()(ids).logits[:, :-1].log_softmax(-1)
        model.float()
        mean = -log_p.gather(-1, ids[:, 1:, None]).mean()
    assert got.value == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert got.value == pytest.approx(mean.exp().item(), rel=1e-5)
    assert perplexity(model, windows(length, batch=4)).value == pytest.approx(got.value, rel=1e-6)
    assert abs(got.value - 50) > 1  # the model is no uniform one: the numbers above mean something


def test_all_counts_the_tail_by_tokens():
    model = tiny_llama()
    standard, every = (perplexity(model, windows(64, tail=True), convention=name) for name in ("standard", "all"))
    assert (every.windows, every.tokens) == (16, 984)
    tail = Batches(windows(64, tail=True).batches[-1:], {})
    assert every.nll * 984 == pytest.approx(standard.nll * 945 + perplexity(model, tail).nll * 39, rel=1e-6)


def test_wanda_is_the_same_number_at_the_whole_context():
    model = tiny_llama()
    assert perplexity(model, windows(64), convention="wanda").value == perplexity(model, windows(64)).value
    with pytest.raises(ConfigError, match="max_position_embeddings = 64, the windows have 32"):
        perplexity(model, windows(32), convention="wanda")


def test_chunks_of_rows_change_nothing(monkeypatch):
    model, other = tiny_llama(), tiny_llama(1)
    whole = evaluate(model, windows(64), against=other)
    monkeypatch.setattr(logits_module, "CHUNK", 50 * 7)
    pieces = evaluate(model, windows(64), against=other)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-6)
    assert pieces.top1 == whole.top1


def test_loss_is_float32_for_a_bfloat16_model():
    model = tiny_llama().bfloat16()
    ids = torch.cat([one["input_ids"] for one in windows(64)])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(ids).logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    got = perplexity(model, windows(64, batch=15))
    assert got.nll == pytest.approx(expected.item(), rel=1e-6)
    assert got.protocol["dtype"] == "bfloat16"


def test_divergence_worked_by_hand():
    # p = (.5, .25, .25), q = (.25, .5, .25): KL = .5 ln 2 - .25 ln 2 = .1732868; first choices 0 and 1
    dense, other = Fixed(torch.tensor([0.5, 0.25, 0.25]).log()), Fixed(torch.tensor([0.25, 0.5, 0.25]).log())
    data = windows(5, vocabulary=3)
    got = divergence(other, data, against=dense)
    assert got.kl == pytest.approx(0.1732868, abs=1e-6)
    assert got.top1 == 0
    assert got.tokens == 800
    # the other direction differs for other distributions: q is the second argument of KL(dense || q)
    skewed = Fixed(torch.tensor([0.8, 0.1, 0.1]).log())
    assert divergence(skewed, data, against=dense).kl == pytest.approx(0.2231436, abs=1e-6)
    assert divergence(dense, data, against=skewed).kl == pytest.approx(0.1927449, abs=1e-6)


def test_divergence_of_masked_vocabulary_is_finite():
    dense, other = Fixed(torch.tensor([0.0, 1.0, -math.inf])), Fixed(torch.tensor([1.0, 0.0, -math.inf]))
    assert 0 < divergence(other, windows(5, vocabulary=2), against=dense).kl < 1


def test_evaluate_agrees_with_its_parts():
    model, dense = tiny_llama(), tiny_llama(1)
    got = evaluate(model, windows(64), against=dense)
    assert got.perplexity == pytest.approx(perplexity(model, windows(64)).value, rel=1e-6)
    assert got.dense_perplexity == pytest.approx(perplexity(dense, windows(64)).value, rel=1e-6)
    parts = divergence(model, windows(64), against=dense)
    assert (got.kl, got.top1) == (parts.kl, parts.top1)
    assert got.kl > 0.1


def test_a_model_against_itself_has_not_moved():
    model = tiny_llama()
    got = evaluate(model, windows(64), against=copy.deepcopy(model))
    assert (got.kl, got.top1) == (0.0, 1.0)
    assert got.perplexity == got.dense_perplexity
    moved = evaluate(copy.deepcopy(model).bfloat16(), windows(64), against=model)
    assert 0 < moved.kl < 0.1
    assert moved.protocol["dense_dtype"] == "float32"


def test_evaluate_leaves_everything_as_it_was():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, windows(64), against=model, device="cpu")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert first.perplexity == evaluate(model.eval(), windows(64)).perplexity  # dropout was off


def test_modes_come_back_after_an_error():
    model = Fixed(torch.full((3,), math.nan)).train()
    with pytest.raises(ScoreError, match="not finite numbers in batch 1 of 200"):
        evaluate(model, windows(5, vocabulary=3))
    assert model.training


def test_protocol_stands_beside_the_numbers():
    data, seen = windows(64, batch=4), []
    got = evaluate(tiny_llama(), data, progress=lambda done, total: seen.append((done, total)))
    expected = {"source": "random", "length": 64, "hash": data.hash, "dtype": "float32", "convention": "standard"}
    assert expected.items() <= got.to_dict()["protocol"].items()
    assert got.protocol["scored_tokens"] == got.tokens == 945
    assert (got.kl, got.top1, got.dense_perplexity) == (None, None, None)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_hash_of_a_model_is_that_of_its_weights(tmp_path):
    model, data = tiny_llama(), windows(64)
    got = evaluate(model, data, against=tiny_llama(1)).protocol
    assert len(got["model"]) == 16
    assert got["model"] == perplexity(tiny_llama().train(), data).protocol["model"]  # whatever the mode
    assert got["dense_model"] == perplexity(tiny_llama(1), data).protocol["model"] != got["model"]
    model.save_pretrained(tmp_path)
    assert perplexity(layerwise.load(tmp_path), data).protocol["model"] == got["model"]
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight.view(-1)
        weight[5] = torch.nextafter(weight[5], torch.tensor(1.0))  # one bit
    assert perplexity(model, data).protocol["model"] != got["model"]
    assert perplexity(tiny_llama().bfloat16(), data).protocol["model"] != got["model"]


def test_the_room_is_also_the_function():
    """Whoever imported `layerwise.evaluate` first, `layerwise.evaluate(...)` evaluates."""
    assert layerwise.evaluate(tiny_llama(), windows(64)) == evaluate(tiny_llama(), windows(64))
    assert layerwise.evaluate(tiny_llama(), windows(64)) == evaluate(tiny_llama(), windows(64))


def test_a_ruined_model_has_infinite_perplexity():
    assert perplexity(Fixed(torch.tensor([0.0, 1e6])), windows(5, vocabulary=1)).value == math.inf


def test_bad_requests():
    with pytest.raises(DataError, match="needs batches of token ids"):
        evaluate(tiny_llama(), Batches(({"pixel_values": torch.ones(1)},), {}))
    with pytest.raises(DataError, match="outside the model's vocabulary of 50"):
        evaluate(tiny_llama(), windows(64, vocabulary=60))
    with pytest.raises(ModelError, match="logits for 3 and 4 tokens"):
        divergence(Fixed(torch.zeros(3)), windows(5, vocabulary=3), against=Fixed(torch.zeros(4)))
    with pytest.raises(ModelError, match="causal language model"):
        perplexity(tiny_llama().model, windows(5))
    with pytest.raises(ConfigError, match="convention"):
        perplexity(tiny_llama(), windows(64), convention="c4")


@pytest.mark.slow
@pytest.mark.skipif("LAYERWISE_BED" not in os.environ, reason="LAYERWISE_BED: a folder with lm/stories260k and text/")
def test_stories260k_has_the_published_loss():
    """Every story as <s> + text cut at 512 tokens: loss 1.4810, perplexity 4.3975 over 85,186 scored tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bed = Path(os.environ["LAYERWISE_BED"])
    model = AutoModelForCausalLM.from_pretrained(bed / "lm" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(bed / "lm" / "stories260k")
    stories = (bed / "text" / "tinystories-train-0-215.txt").read_text().split("<|endoftext|>")
    rows = [[1, *tokenizer(story.strip())["input_ids"]][:512] for story in stories if story.strip()]
    data = Batches(tuple({"input_ids": torch.tensor([row])} for row in rows), {})
    got = perplexity(model, data, convention="all")
    assert got.tokens == 85_186
    assert got.value == pytest.approx(4.3975, abs=1e-4)
    whole = held_out(bed / "text" / "tinystories-train-0-215.txt", tokenizer, length=256, tokens=4096, bos=True)
    assert 3 < perplexity(model, whole).value < 8
