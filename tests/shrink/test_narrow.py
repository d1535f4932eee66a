"""Models with widths of each layer: saved, loaded, registered, trained; equal widths load with stock classes alone."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from layerwise.io import load, save
from layerwise.shrink import narrow, shrink, widths_of
from layerwise.structure import coupled_groups
from models import MODELS, inputs_for
from shrinking import drawn, outputs

DECODERS = "llama mistral qwen2 qwen3 qwen3_moe mixtral gemma3 phi3 gpt2 gpt_neox opt gpt_oss llama4".split()
OTHERS = "t5 bert vit clip llava whisper falcon bloom".split()


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )


def cut(name, seed=0):
    model = MODELS[name]().eval()
    shrink(model, drawn(coupled_groups(model), seed))
    return model


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_it_comes_back_bit_for_bit(name, tmp_path):
    model = cut(name)
    stock = type(model).__mro__[1]
    assert type(model).__name__ == stock.__name__
    save(model, tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("per_layer_config" in config) != ("layerwise_widths" in config)
    again = load(tmp_path / "out")
    assert type(again) is type(model)
    assert same(again, model)
    batch = inputs_for(name, model, seed=0)
    for got, wanted in zip(outputs(again, batch), outputs(model, batch), strict=True):
        assert torch.equal(got, wanted)
    again.save_pretrained(tmp_path / "again")  # by transformers' own method
    assert same(load(tmp_path / "again"), model)
    with pytest.raises(Exception):  # noqa: B017, PT011  (a stock class must not build another model without a word)
        stock.from_pretrained(tmp_path / "out", ignore_mismatched_sizes=False)


def test_config_json_is_in_transformers_own_format(tmp_path):
    model = cut("llama")
    save(model, tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    groups = {group.name: group for group in coupled_groups(model).groups}
    for index in range(2):
        said = config["per_layer_config"][str(index)]
        attention, mlp = groups[f"model.layers.{index}.self_attn"], groups[f"model.layers.{index}.mlp"]
        assert said.get("intermediate_size", config["intermediate_size"]) == mlp.units
        assert said.get("num_key_value_heads", config["num_key_value_heads"]) == attention.units
        assert said.get("num_attention_heads", config["num_attention_heads"]) == attention.heads
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert read.is_heterogeneous
    assert read.per_layer_config[0].intermediate_size == groups["model.layers.0.mlp"].units


def test_the_folder_is_checked_in_a_fresh_process(tmp_path):
    saved = save(cut("llama"), tmp_path / "out")
    assert saved.verified is not None
    assert saved.verified.loader == "layerwise.load"
    assert saved.verified.difference == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "channels") for name in ("t5", "whisper", "clip", "llava", "gpt2")]
    + [(name, "heads") for name in ("qwen2", "phi3", "vit")],
)
def test_equal_widths_are_the_stock_class_s_by_whatever_name_the_config_has(name, kind, tmp_path):
    model = MODELS[name]()
    shrink(model, {g.name: range(g.units // 2) for g in coupled_groups(model).groups if g.kind == kind})
    assert "layerwise_narrow" not in vars(type(model))
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert same(again, model)
    batch = inputs_for(name, model, seed=0)
    for got, wanted in zip(outputs(again, batch), outputs(model, batch), strict=True):
        torch.testing.assert_close(got, wanted)


def test_stacks_of_other_widths_are_the_stock_class_s_where_each_has_a_name():
    for name, stock in (("whisper", True), ("t5", False)):
        model = MODELS[name]()
        groups = [group for group in coupled_groups(model).groups if group.kind == "channels"]
        shrink(model, {g.name: range(24 if "encoder" in g.name else 40) for g in groups})
        assert ("layerwise_narrow" not in vars(type(model))) == stock


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "mixtral", "opt", "gpt_neox"])
def test_equal_channels_load_with_the_stock_class(name, tmp_path):
    model = MODELS[name]()
    shrink(model, {g.name: range(g.multiple, g.units) for g in coupled_groups(model).groups if g.kind == "channels"})
    assert "layerwise_narrow" not in vars(type(model))
    model.save_pretrained(tmp_path / "out")
    assert same(type(model).from_pretrained(tmp_path / "out"), model)
    assert save(model, tmp_path / "checked").verified.loader.startswith("transformers.")


def test_equal_heads_load_with_the_stock_class_where_it_takes_a_size_of_heads(tmp_path):
    model = MODELS["llama"]()
    shrink(model, {group.name: [1] for group in coupled_groups(model).groups if group.kind == "heads"})
    assert model.config.num_attention_heads == 2
    assert model.config.num_key_value_heads == 1
    assert model.config.head_dim == 8
    model.save_pretrained(tmp_path / "out")
    assert same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"), model)
    other = MODELS["gpt2"]()  # its heads are hidden size over their number
    shrink(other, {group.name: [0, 2, 3] for group in coupled_groups(other).groups if group.kind == "heads"})
    assert "layerwise_narrow" in vars(type(other))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_it_is_pickled_and_copied(protocol):
    model = cut("llama")
    for again in (pickle.loads(pickle.dumps(model, protocol)), copy.deepcopy(model)):  # noqa: S301
        assert type(again) is type(model)
        assert same(again, model)
        assert next(again.parameters()) is not next(model.parameters())
        assert again.config is again.model.config is not model.config
        batch = inputs_for("llama", model, seed=0)
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_torch_saves_it_whole(tmp_path):
    model = cut("llama")
    torch.save(model, tmp_path / "model.pt")
    program = f"import torch; print(type(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "LlamaForCausalLM\n"


def test_cutting_again_and_back_to_equal(tmp_path):
    model = MODELS["llama"]()
    shrink(model, {"model.layers.0.mlp": range(40)})
    assert widths_of(model) == {"model.layers.0.mlp": 40}
    shrink(model, {"model.layers.1.mlp": range(40)})
    assert "layerwise_narrow" not in vars(type(model))
    assert model.config.intermediate_size == 40
    assert widths_of(model) == {}


def test_register_lets_auto_classes_build_it(tmp_path):
    save(cut("llama"), tmp_path / "out", verify=False)
    MODELS["llama"]().save_pretrained(tmp_path / "stock")
    program = f"""
import layerwise as lw, transformers, torch
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
except Exception as error:
    print(type(error).__name__)
lw.register()
lw.register()
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
ids = torch.arange(2, 8)[None]
print(tuple(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape))
model.save_pretrained({str(tmp_path / "third")!r})
stock = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "stock")!r})
print(type(stock).__name__, stock.config.intermediate_size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["AmbiguousGlobalPerLayerAttributeError", "(1, 9)", "LlamaForCausalLM 64"]
    first, third = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "third"))
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) for name in first)


AUTOS = (
    "t5 ForSeq2SeqLM|t5 |bert ForMaskedLM|bert |gpt2 |gpt2 ForSequenceClassification|llama |gpt_neox |whisper ForSpeechSeq2Seq|whisper"
    " |llava ForImageTextToText|vit "
)


def test_every_auto_class_builds_it(tmp_path):
    """In a process of its own, since it stays registered. AutoModel takes what another class has within it, and the other way round."""
    cases = [one.split(" ") for one in AUTOS.split("|")]
    for name in {name for name, _ in cases}:
        save(cut(name), tmp_path / name, verify=False)
    program = f"""
import layerwise as lw, transformers, torch
from layerwise.structure import coupled_groups
lw.register()
for name, kind in {cases!r}:
    folder = {str(tmp_path)!r} + "/" + name
    model = getattr(transformers, "AutoModel" + kind).from_pretrained(folder)
    want = {{group.name: group.units for group in coupled_groups(lw.load(folder)).groups}}
    got = {{group.name: group.units for group in coupled_groups(model).groups}}
    assert len(got) == len(want) and [*got.values()] == [*want.values()], (name, kind)
    if name == "llama":
        model.save_pretrained(folder + "-within")
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder + "-within")
        assert {{group.name: group.units for group in coupled_groups(whole).groups}} == want
    print(name, kind)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [" ".join(one) for one in cases], done.stderr


def test_trainer_and_peft_work_on_it(tmp_path):
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    model = cut("llama")
    ids = torch.randint(2, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": one, "labels": one.clone()} for one in ids]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert same(load(tmp_path / "run/checkpoint-2"), model)
    base = copy.deepcopy(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    batch = inputs_for("llama", base, seed=0)
    torch.testing.assert_close(again(**batch).logits, wrapped(**batch).logits)


def test_narrow_of_a_stock_config_is_the_stock_model():
    model = MODELS["llama"]()
    again = narrow(type(model))(copy.deepcopy(model.config))
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]
    assert narrow(type(model)) is narrow(type(model)) is narrow(narrow(type(model)))
