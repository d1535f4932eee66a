"""The residual stream cut: equal to keeping the channels at zero, saved for stock classes, refused where it has no exact form."""

import copy
import random

import pytest
import torch

from layerwise.errors import ConfigError, ModelError
from layerwise.shrink.hidden import cut_hidden, hidden_parts
from models import MODELS, inputs_for


def zeroed(model, keep):
    """The same channels kept at zero by all that writes them."""
    gone = sorted({*range(model.config.hidden_size)} - {*keep})
    for part in hidden_parts(model):
        if part.side == "out" and "norm" not in part.parameter:
            model.get_parameter(part.parameter).data.index_fill_(part.dim, torch.tensor(gone), 0)
    return model


@pytest.mark.parametrize("kept", [4, 16, 28])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"])
def test_removing_is_zeroing(name, kept, tmp_path):
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # gains of one and biases of zero would hide a mistake
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    keep = random.Random(kept).sample(range(32), kept)  # noqa: S311
    other = zeroed(copy.deepcopy(model), keep)
    before = sum(one.numel() for one in model.parameters())
    cut_hidden(model, keep)
    batch = inputs_for(name, model, seed=0)
    with torch.no_grad():
        # Qwen3's epsilon is that of its query and key norms, too, and stays; tiny random states are near it
        close = {"rtol": 0, "atol": 2e-2 if "qwen3" in name else 1e-6}
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits, **close)
    assert sum(one.numel() for one in model.parameters()) < before
    assert model.config.hidden_size == len(keep)
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_a_tied_head_stays_tied():
    model = MODELS["qwen2"]()
    cut_hidden(model, range(0, 32, 2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[1] == 16


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "t5", "vit", "bert"])
def test_what_has_no_exact_form_is_refused_before_anything_is_cut(name):
    model = MODELS[name]()
    shapes = [one.shape for one in model.parameters()]
    values = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(ModelError):
        cut_hidden(model, range(16))
    assert [one.shape for one in model.parameters()] == shapes
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))


def test_a_size_that_the_config_refuses():
    with pytest.raises(ConfigError, match="refused by LlamaConfig"):
        cut_hidden(MODELS["llama"](), range(13))


@pytest.mark.parametrize("keep", [[], [0, 0], [32], [-1]])
def test_channels_that_are_not_there(keep):
    with pytest.raises(ConfigError, match="channels 0 to 31"):
        cut_hidden(MODELS["llama"](), keep)
