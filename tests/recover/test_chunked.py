"""Divergences by hand, rows of logits in chunks, blocks' outputs beside the teacher's."""

import pytest
import torch
from torch import nn

from layerwise.errors import ConfigError, ModelError
from layerwise.recover import Distillation, distillation_loss, relative_error
from layerwise.recover.chunked import head_of, summed
from layerwise.recover.hidden import block_pairs
from models import MODELS, inputs_for, small_llama

IDS = {"input_ids": torch.arange(2, 22).reshape(2, 10)}
STUDENT, TEACHER = torch.tensor([[1.0, 0, 0]]), torch.tensor([[2.0, 1, 0]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.053808), ({"beta": 1.0}, 0.068103), ({"beta": 0.5}, 0.014852), ({"temperature": 2.0}, 0.083781),
    ],
)  # fmt: skip
def test_divergences_by_hand(settings, expected):
    assert distillation_loss(STUDENT, TEACHER, **settings) == pytest.approx(expected, abs=1e-6)
    assert distillation_loss(STUDENT, STUDENT + 3, **settings) == pytest.approx(0, abs=1e-6)


def test_a_masked_vocabulary_gives_a_number():
    low = torch.tensor([[1.0, 0, -torch.inf]])
    assert distillation_loss(low, low + 1).isfinite()


def test_relative_error_by_hand():
    teacher, student = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[1.5, 2], [0, 0.5]])
    assert relative_error(student, teacher) == pytest.approx(0.083333, abs=1e-6)
    assert relative_error(student, teacher, torch.tensor([True, False])) == pytest.approx(0.25 / 5)
    with pytest.raises(ModelError, match="other widths"):
        relative_error(student, teacher[:, :1])


def pair(name="llama", scale=1.2):
    student, teacher = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(scale)
    return student.float(), teacher.float()


def gradients(loss, model, batch):
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), found


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 1.0}, {"beta": 0.3, "temperature": 2.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"hidden": 0.5}]
)
def test_chunks_change_neither_loss_nor_gradients(settings):
    student, teacher = pair()
    batch = inputs_for("llama", student, batch=3)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    whole = gradients(Distillation(teacher, rows=None, **settings), student, batch)
    parted = Distillation(teacher, rows=4, **settings)
    chunked = gradients(parted, student, batch)
    assert parted._known["heads"] is not None
    torch.testing.assert_close(chunked[0], whole[0])
    assert chunked[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(chunked[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_labels_that_are_ignored_do_not_count():
    student, teacher = pair()
    batch = IDS
    labels = batch["input_ids"].clone()
    labels[:, 4:] = -100
    for rows in (None, 3):
        short = Distillation(teacher, rows=rows)(student, {"input_ids": batch["input_ids"][:, :4]})
        long = Distillation(teacher, rows=rows)(student, {**batch, "labels": labels})
        torch.testing.assert_close(short, long)


def test_a_tied_head_gets_both_its_gradients():
    student, teacher = (small_llama(seed, tie_word_embeddings=True, dtype=torch.float32) for seed in (0, 1))
    batch = IDS
    _, whole = gradients(Distillation(teacher, rows=None), student, batch)
    _, chunked = gradients(Distillation(teacher, rows=5), student, batch)
    torch.testing.assert_close(chunked["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_what_follows_a_head_is_seen():
    """Gemma 2 caps its logits, so its head alone does not make them."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        final_logit_softcapping=0.5,
    )  # fmt: skip
    capped = transformers.Gemma2ForCausalLM(config).eval()
    batch = {"input_ids": torch.arange(12)[None]}
    assert head_of(capped, batch) is None
    assert head_of(small_llama(0), IDS) is not None
    assert head_of(nn.Linear(2, 2), {"input": torch.ones(1, 2)}) is None


def test_few_logits_are_in_memory():
    """The largest tensor that is saved for the backward pass has the rows of a chunk at most."""
    hidden, weight = torch.randn(64, 8, requires_grad=True), nn.Parameter(torch.randn(500, 8))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        value = summed(lambda rows, part: (rows @ weight.T).square().sum(), hidden, [weight], rows=4)
    assert max(sizes) <= max(4 * 500, weight.numel())
    value.backward()
    expected = torch.autograd.grad((hidden @ weight.T).square().sum(), [hidden, weight])
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(summed(lambda rows, part: rows.sum(), hidden, [weight]), hidden.sum())


def test_blocks_of_student_and_teacher():
    student, teacher = small_llama(0, num_hidden_layers=1), small_llama(0, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="say which came from which"):
        block_pairs(student, teacher)
    pairs = block_pairs(student, teacher, {"model.layers.0": "model.layers.1"})
    assert pairs == [("model.layers.0", "model.layers.1")]
    with pytest.raises(ConfigError, match=r"no block .model\.layers\.9"):
        block_pairs(student, teacher, {"model.layers.0": "model.layers.9"})
    batch = IDS
    loss = Distillation(teacher, hidden=1.0, blocks={"model.layers.0": "model.layers.1"})
    assert loss(student, batch) > 0
    assert loss.parts["hidden"] > 0


def test_another_vocabulary_is_cut_to_what_both_know():
    student, teacher = small_llama(0, vocab_size=70), small_llama(1, vocab_size=64)
    batch = {"input_ids": torch.arange(2, 14)[None]}
    with pytest.raises(ModelError, match="same classes"):
        Distillation(teacher)(student, batch)
    for rows in (None, 4):
        assert Distillation(teacher, vocabulary=60, rows=rows)(student, batch).isfinite()
