"""A cast model is what loading would make of its file."""

import torch

from layerwise.recover.dtypes import cast
from models import small_llama


def test_frequencies_that_no_file_holds_stay_wide(tmp_path):
    model = small_llama(dtype=torch.float32)
    cast(model, torch.bfloat16)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(2, 30)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tied_weights_stay_tied_and_batch_norms_follow():
    model = small_llama(tie_word_embeddings=True)
    cast(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    norm = torch.nn.BatchNorm1d(3)
    cast(norm, torch.float64)
    assert norm.running_mean.dtype == norm.weight.dtype == torch.float64
    assert norm.num_batches_tracked.dtype == torch.int64
