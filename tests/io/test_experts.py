"""Packed folders of models whose experts are one weight: packed one by one, or dense in the form of each reader, and what is refused
before any work."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.errors import ModelError, PlanError
from layerwise.io import check_experts, load, load_streamed, save, save_whole_streamed
from layerwise.io.experts import BY_BLOCK, experts_of, ignored_beside_linears, published
from layerwise.io.pack_quantized import Scheme
from layerwise.io.packed_config import config_of
from layerwise.recover.quantized import refuse_quantized
from layerwise.structure import structure_of
from models import MODELS, inputs_for
from quantized import quantized, rounded

pytest.importorskip("compressed_tensors")
LAYER = "model.layers.0.mlp.experts.gate_up_proj"
GROUPS = {"mixtral": 32, "qwen3_moe": 8}  # that divide their inputs


def attention(name, index):
    return (4, None, index % 2 > 0) if "self_attn" in name else None


def with_zeros(name, index):
    return (4, None, False) if "self_attn" in name else None


def symmetric(name, index):
    return (4, None, True) if "self_attn" in name else None


def eight(name, index):
    return (8, None, True) if "self_attn" in name else None


def of_experts(model, scheme):
    """Codes of the experts, which become what these give; `scheme` gives (bits, group, symmetric) by name, or None."""
    codes = {}
    for name in experts_of(model):
        if (found := scheme(name)) is None:
            continue
        weight = model.get_parameter(name)
        dtype = weight.dtype if weight.dtype == torch.bfloat16 else torch.float16
        codes[name] = rounded(weight.flatten(0, 1), found[0], found[1], symmetric=found[2], dtype=dtype)
        weight.data = codes[name].weight().reshape(weight.shape).to(weight.dtype)
    return codes


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
    codes = quantized(model, symmetric) | of_experts(model, lambda name: (4, None, True) if name == LAYER else None)
    saved = save(model, tmp_path / "out", codes=codes)
    assert f"1 layer ({LAYER}) saved dense: all experts are packed or none, and 3 layers" in saved.report.notes[0]
    assert same_logits("mixtral", model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("name", "bits", "group", "target"), [
    ("mixtral", 4, 32, "transformers"), ("mixtral", 3, None, "transformers"), ("mixtral", 4, 32, "vllm"),
    ("qwen3_moe", 4, 8, "transformers"), ("qwen3_moe", 8, None, "vllm"),
])  # fmt: skip
def test_experts_of_one_scheme_are_packed_and_read_by_the_stock_class(tmp_path, name, bits, group, target):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "dense")
    codes = quantized(model, eight) | of_experts(model, lambda _: (bits, group, True))
    saved = save(model, tmp_path / "out", codes=codes, target=target)
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.report.notes == ()
    each = 2 * 4 * 3  # blocks, experts, matrices of an expert
    assert saved.report.packed.by_bits == ({8: each + 8} if bits == 8 else {bits: each, 8: 8})
    assert saved.report.packed.weights == sum(one.values.numel() for one in codes.values())
    assert size_of(tmp_path / "out") < (0.5 if bits < 8 else 0.7) * size_of(tmp_path / "dense")
    names = {f"{part}.weight_packed" for parts in published(model).values() for part in parts}
    assert names < stored(tmp_path / "out")
    assert {one.replace("_packed", "") for one in names} < stored(tmp_path / "dense")
    assert same_logits(name, model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    loaded = load(tmp_path / "out")
    assert same_logits(name, model, loaded)
    assert {*loaded.layerwise_quantized} == {*codes}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_packed_experts_are_the_same_in_bfloat16_in_a_fresh_process(tmp_path, name):
    model = MODELS[name]().bfloat16()
    saved = save(model, tmp_path / "out", codes=of_experts(model, lambda _: (4, GROUPS[name], True)))
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.verified.tensors == len(model.state_dict())
    with pytest.raises(ModelError, match=r'"model.layers.0.mlp.experts.gate_up_proj" is quantized'):
        refuse_quantized(load(tmp_path / "out"))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("beside", [eight, with_zeros])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_vllm_gets_a_scheme_for_the_experts_of_each_block(tmp_path, name, beside):
    model = MODELS[name]()
    experts = of_experts(model, lambda one: (4 if ".0.mlp" in one or beside is with_zeros else 8, None, True))
    saved = save(model, tmp_path / "out", codes=quantized(model, beside) | experts, target="vllm")
    assert saved.verified is not None
    assert saved.verified.loader == "layerwise.load"
    assert saved.report.notes == (BY_BLOCK,)
    assert same_logits(name, model, load(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    for index in range(2):  # what vLLM asks for, whatever the names in the files
        asked = f"model.layers.{index}.{block}.experts.3.gate_proj"
        (group,) = [one for one in config["config_groups"].values() if ignored_by_vllm(asked, one["targets"])]
        assert group["weights"]["num_bits"] == experts[f"model.layers.{index}.mlp.experts.down_proj"].bits
        assert not ignored_by_vllm(asked, config["ignore"])
        assert ignored_by_vllm(f"model.layers.{index}.{block}.gate", config["ignore"])


UNLIKE = [
    ("transformers", lambda one: (4 if ".0.mlp" in one else 8, None, True), "all experts of a model have one scheme"),
    ("transformers", lambda one: (4, None, False), "without zeros alone"),
    ("vllm", lambda one: (4 if "down" in one else 8, None, True), "all experts of a block have one scheme"),
    ("vllm", lambda one: (2, None, True), "kernels for experts have 4 and 8 bits, not 2"),
    ("vllm", lambda one: (4, None, False), "without zeros alone"),
]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("target", "scheme", "why"), UNLIKE)
def test_experts_that_a_reader_cannot_take_are_dense_or_refused_before_any_work(tmp_path, target, scheme, why):
    model = MODELS["mixtral"]()
    with pytest.raises(PlanError, match=why):
        check_experts(model, {name: Scheme(*scheme(name)) for name in experts_of(model)}, target)
    codes = quantized(model, symmetric) | of_experts(model, scheme)
    saved = save(model, tmp_path / "out", codes=codes, target=target)
    assert any("4 layers (model.layers.0.mlp.experts" in note and why in note for note in saved.report.notes)
    assert saved.report.packed.by_bits == {4: 8}
    assert same_logits("mixtral", model, load(tmp_path / "out"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_what_is_asked_for_an_engine_is_checked_before_any_work(name, target):
    model = MODELS[name]()
    layers = dict.fromkeys(layer.name for layer in structure_of(model))
    linears = dict.fromkeys(layer for layer in layers if "experts" not in layer)
    some = dict.fromkeys(layer for layer in layers if ".1.mlp.experts" not in layer)
    check_experts(model, {}, target)
    if name == "llama4" and target == "transformers":
        with pytest.raises(PlanError, match=r"leaves them random\. Take --for vllm"):
            check_experts(model, linears, target)
    else:
        check_experts(model, linears, target)
    if name in GROUPS:
        check_experts(model, layers, target)
        with pytest.raises(PlanError, match=r"all experts are packed or none, and 2 layers .* would stay dense"):
            check_experts(model, some, target)
        return
    with pytest.raises(PlanError) as error:
        check_experts(model, layers, target)
    assert len(error.value.problems) == 1 + (name == "llama4" and target == "transformers")
    assert error.value.problems[-1].startswith(f"{target}: 4 layers (model.layers.0.")
    assert "--exclude '*.experts*'" in error.value.problems[-1]


@pytest.mark.usefixtures("in_this_process")
def test_streamed_experts_are_dense_with_a_note(tmp_path):
    model = MODELS["qwen3_moe"]()
    codes = of_experts(model, lambda _: (4, 8, True))
    model.save_pretrained(tmp_path / "in", save_original_format=False)
    streamed = load_streamed(tmp_path / "in")
    with pytest.raises(PlanError, match="experts of a streamed model are not packed"):
        check_experts(streamed, dict.fromkeys(codes), "transformers")
    saved = save_whole_streamed(streamed, tmp_path / "out", dense=tmp_path / "in", codes=codes)
    assert "4 layers" in saved.report.notes[0]
    assert same_logits("qwen3_moe", model, load(tmp_path / "out"))
    save(model, tmp_path / "packed", codes=codes)
    with pytest.raises(ModelError, match="Load the model whole"):
        load_streamed(tmp_path / "packed")


def stored(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())
