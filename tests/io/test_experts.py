"""Packed folders of models whose experts are one weight: dense experts in the form of each reader, and what is refused before any work."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.errors import PlanError
from layerwise.io import check_experts, load, save
from layerwise.io.experts import experts_of, ignored_beside_linears
from layerwise.io.pack_quantized import Scheme
from layerwise.io.packed_config import config_of
from layerwise.structure import structure_of
from models import MODELS, inputs_for
from quantized import quantized, rounded

pytest.importorskip("compressed_tensors")
LAYER = "model.layers.0.mlp.experts.gate_up_proj"


def attention(name, index):
    return (4, None, index % 2 > 0) if "self_attn" in name else None


def with_zeros(name, index):
    return (4, None, False) if "self_attn" in name else None


def symmetric(name, index):
    return (4, None, True) if "self_attn" in name else None


def with_experts(model):
    """Codes of the attention, and of one block's experts."""
    codes, experts = quantized(model, symmetric), model.get_parameter(LAYER)
    codes[LAYER] = rounded(experts.flatten(0, 1), 4, None, symmetric=True, dtype=torch.float16)
    experts.data = codes[LAYER].weight().reshape(experts.shape)
    return codes


def same_logits(name, one, other):
    inputs = inputs_for(name, one)
    with torch.no_grad():
        return torch.equal(one(**inputs).logits, other(**inputs).logits)


def ignored_by_vllm(layer, ignore):
    """Its matching: exact names, and regular expressions from the start of the name."""
    return any(re.match(one[3:], layer) if one.startswith("re:") else one == layer for one in ignore)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_packed_attention_loads_with_the_stock_class(tmp_path, name):
    model = MODELS[name]()
    saved = save(model, tmp_path / "out", codes=quantized(model, attention))
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.report.packed is not None
    assert sum(saved.report.packed.by_bits.values()) == 8
    assert same_logits(name, model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert same_logits(name, model, load(tmp_path / "out"))


@pytest.mark.parametrize(("name", "block"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp"), ("gpt_oss", "mlp")])
@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_engines_leave_experts_and_routers_alone(tmp_path, name, block, target):
    model = MODELS[name]()
    codes = quantized(model, symmetric)
    save(model, tmp_path / "out", codes=codes, target=target, verify=False)
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    router = "router" if name == "gpt_oss" else "gate"
    for own in (router, "experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"):  # what vLLM asks for
        assert ignored_by_vllm(f"model.layers.1.{block}.{own}", ignore)
    assert ignored_by_vllm("lm_head", ignore)
    assert not any(ignored_by_vllm(layer, ignore) for layer in codes)
    assert not ignored_by_vllm("model.layers.1.mlp.shared_experts.gate_proj", ignore)


def test_no_pattern_takes_what_is_packed():
    four = Scheme(4, None, True)
    config = config_of({"model.layers.0.mlp.gate": four}, ["lm_head"], ignored_beside_linears(MODELS["mixtral"]()))
    assert config["ignore"] == ["lm_head", r"re:.*\.experts\..*"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama4"])
def test_vllm_gets_experts_as_they_are_published(tmp_path, name):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "published")
    saved = save(model, tmp_path / "out", codes=quantized(model, with_zeros), target="vllm")
    assert saved.verified is not None
    assert saved.verified.loader == "layerwise.load"
    assert "as vLLM takes them" in saved.report.notes[0]
    published, ours = (stored(tmp_path / folder) for folder in ("published", "out"))
    assert {one for one in ours if "experts." in one} == {one for one in published if "experts." in one}
    assert same_logits(name, model, load(tmp_path / "out"))


def test_transformers_cannot_read_dense_experts_one_by_one_yet(tmp_path):
    """Why they are stored in one weight for it; when this fails, they may be stored as they are published."""
    model = MODELS["qwen3_moe"]()
    save(model, tmp_path / "out", codes=quantized(model, symmetric), target="vllm", verify=False)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.usefixtures("in_this_process")
def test_experts_that_transformers_rebuilds_leave_all_dense(tmp_path):
    model = MODELS["llama4"]()
    saved = save(model, tmp_path / "out", codes=quantized(model, symmetric))
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.report.packed is None
    assert "8 layers" in saved.report.notes[0]
    assert "leaves them random" in saved.report.notes[0]


@pytest.mark.usefixtures("in_this_process")
def test_without_an_engine_named_experts_are_dense_with_a_note(tmp_path):
    model = MODELS["mixtral"]()
    saved = save(model, tmp_path / "out", codes=with_experts(model))
    assert f"1 layer ({LAYER}) saved dense" in saved.report.notes[0]
    assert same_logits("mixtral", model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_what_is_asked_for_an_engine_is_checked_before_any_work(name):
    model = MODELS[name]()
    layers = [layer.name for layer in structure_of(model)]
    linears = [layer for layer in layers if "experts" not in layer]
    assert len(experts_of(model)) == 4
    for target in ("transformers", "vllm"):
        with pytest.raises(PlanError) as error:
            check_experts(model, layers, target)
        assert len(error.value.problems) == 1 + (name == "llama4" and target == "transformers")
        assert error.value.problems[-1].startswith(f"{target}: 4 layers (model.layers.0.")
        assert "--exclude '*.experts*'" in error.value.problems[-1]
    check_experts(model, linears, "vllm")
    check_experts(model, [], "transformers")
    if name == "llama4":
        with pytest.raises(PlanError, match=r"leaves them random\. Take --for vllm"):
            check_experts(model, linears, "transformers")
    else:
        check_experts(model, linears, "transformers")


def stored(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())
