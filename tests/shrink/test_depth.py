"""Blocks dropped: the others see what they would have seen, counts and caches are right, and stock classes load the folder."""

import pytest
import torch
import transformers
from torch import nn

from layerwise.errors import ConfigError, ModelError
from layerwise.io import load, save
from layerwise.shrink import drop_blocks, shrink
from layerwise.structure import structure_of
from models import DECODER, MODELS, inputs_for, small_llama
from shrinking import outputs


def longer(name, **more):
    """The tiny model of this name with more blocks."""
    short = MODELS[name]()
    config = type(short.config).from_dict({**short.config.to_dict(), **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(short)(config)


LONG = {
    "llama": lambda: small_llama(**{**DECODER, "num_hidden_layers": 4}),
    "gpt2": lambda: longer("gpt2", n_layer=4),
    "opt": lambda: longer("opt", num_hidden_layers=4),
    "gemma3": lambda: longer("gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "qwen3_moe": lambda: longer("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[3]),
    "vit": lambda: longer("vit", num_hidden_layers=4),
    "whisper": lambda: longer("whisper", encoder_layers=4, decoder_layers=3),
}


class Passed(nn.Module):
    """In the place of a block: hands its input on."""

    def __init__(self, block):
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )


@pytest.mark.parametrize("name", LONG)
def test_it_is_the_model_whose_blocks_pass_their_input_on(name, tmp_path):
    model, other = LONG[name]().eval(), LONG[name]().eval()
    other.load_state_dict(model.state_dict())
    stack = structure_of(model).stacks[0]
    gone = [stack.blocks[index].name for index in (1, 2)]
    for index in (1, 2):
        other.get_submodule(stack.name)[index] = Passed(other.get_submodule(stack.name)[index])
    drop_blocks(model, gone)
    batch = inputs_for(name, model, seed=0)
    for got, wanted in zip(outputs(model, batch), outputs(other, batch), strict=True):
        torch.testing.assert_close(got, wanted)
    model.save_pretrained(tmp_path / "out")
    assert same(type(model).from_pretrained(tmp_path / "out"), model)


def test_one_stack_that_cannot_is_found_before_the_other_loses_anything():
    """Whisper's encoder could; all of its decoder cannot."""
    model = LONG["whisper"]()
    encoder, decoder = structure_of(model).stacks
    names = [encoder.blocks[1].name, *(block.name for block in decoder.blocks)]
    with pytest.raises(ConfigError, match="Keep at least one"):
        drop_blocks(model, names)
    assert len(model.model.encoder.layers) == model.config.encoder_layers == 4
    drop_blocks(model, names[:3])  # of both
    assert len(model.model.encoder.layers) == model.config.encoder_layers == 3
    assert len(model.model.decoder.layers) == model.config.decoder_layers == 1
    assert all(one.isfinite().all() for one in outputs(model, inputs_for("whisper", model, seed=0)))


def test_lists_of_the_config_and_cache_indices_are_rewritten():
    model = LONG["gemma3"]()
    drop_blocks(model, ["model.layers.1", "model.layers.2"])
    config = model.config
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    moe = LONG["qwen3_moe"]()
    drop_blocks(moe, ["model.layers.0"])
    assert moe.config.mlp_only_layers == [2]
    assert moe.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_it_generates_with_a_cache_what_it_generates_without(name):
    model = LONG[name]().eval()
    drop_blocks(model, [structure_of(model).blocks[0].name])
    ids = inputs_for(name, model, seed=0)["input_ids"][:1, :6]
    with_cache, without = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_after_cutting_widths_stay_with_their_blocks(tmp_path):
    model = LONG["llama"]()
    shrink(model, {"model.layers.3.mlp": range(10), "model.layers.0.mlp": range(20)})
    drop_blocks(model, ["model.layers.1"])
    save(model, tmp_path / "out", verify=False)
    again = load(tmp_path / "out")
    assert same(again, model)
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [20, 64, 10]


def test_models_of_other_libraries():
    model = MODELS["timm_vit"]()
    drop_blocks(model, ["blocks.0"])
    assert len(model.blocks) == 1


def test_what_cannot_be_dropped():
    with pytest.raises(ModelError, match="no such block"):
        drop_blocks(small_llama(), ["model.layers.9"])
    model = small_llama()
    names = [block.name for block in structure_of(model).blocks]
    with pytest.raises(ConfigError, match="Keep at least one"):
        drop_blocks(model, names)
    assert len(model.model.layers) == len(names)
    t5 = MODELS["t5"]()
    with pytest.raises(ModelError, match="may hold what others use"):
        drop_blocks(t5, ["encoder.block.0"])
    assert len(t5.encoder.block) == 2
    drop_blocks(t5, ["encoder.block.1"])
    assert t5.config.num_layers == 1
    assert isinstance(t5, transformers.T5ForConditionalGeneration)
