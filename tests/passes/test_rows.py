"""Whose mask it is: encoder-decoders that are given inputs for the decoder, or labels, or neither; and models of one stack."""

import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification

from layerwise.engine import compress
from layerwise.methods import Uniform
from layerwise.passes.rows import mask_of
from layerwise.solvers import Wanda
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for

ENCODER, DECODER = "model.encoder.layers.0", "model.decoder.layers.0"


def test_a_decoder_that_is_fed_the_labels_is_masked_by_them():
    """T5 makes the decoder's inputs of the labels: padded to the encoder's length, it still has padding of its own."""
    model = MODELS["t5"]()
    ids = inputs_for("t5", model)["input_ids"]
    length = ids.shape[1]
    seen = torch.ones_like(ids)
    seen[1, length - 2 :] = 0
    labels = inputs_for("t5", model, seed=1)["input_ids"]
    labels[0, 3:] = -100
    given = {
        "input_ids": ids,
        "attention_mask": seen,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        "decoder_attention_mask": (labels != -100).long(),
    }
    masks = []
    for batch in ({"input_ids": ids, "attention_mask": seen, "labels": labels}, given):
        one = MODELS["t5"]()
        compress(one, Uniform(sparsity=0.5).plan(one), solver=Wanda(), data=Batches((batch,), {}))
        masks.append({name: value == 0 for name, value in one.state_dict().items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])
    batch = {"input_ids": ids, "attention_mask": seen, "labels": labels}
    assert torch.equal(mask_of(model, batch, "encoder.block.0"), seen)
    assert torch.equal(mask_of(model, batch, "decoder.block.1"), labels != -100)
    assert torch.equal(mask_of(model, batch, ""), labels != -100)  # the head


def test_a_bart_that_classifies_feeds_its_decoder_the_input():
    config = BartConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    model = BartForSequenceClassification(config)
    mask = torch.tensor([[1, 1, 0]])
    batch = {"input_ids": torch.tensor([[5, 2, 1]]), "attention_mask": mask, "labels": torch.tensor([1])}
    assert mask_of(model, batch, DECODER) is mask


@pytest.mark.parametrize("labels", [False, True])
def test_opt_s_only_stack_is_called_a_decoder(labels):
    model = MODELS["opt"]()
    mask = torch.tensor([[0, 1, 1]])
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": mask}
    if labels:
        batch["labels"] = torch.tensor([[-100, -100, 6]])
    assert mask_of(model, batch, DECODER) is mask
    assert mask_of(model, batch, ENCODER) is mask


def test_a_decoder_that_is_given_its_inputs_without_a_mask_has_none():
    model = MODELS["t5"]()
    batch = {**inputs_for("t5", model), "attention_mask": torch.ones(2, 5)}
    assert mask_of(model, batch, "decoder.block.0") is None
