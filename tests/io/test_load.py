"""Loading, and every way in which a folder can be wrong: one ModelError, one line, that names the culprit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from layerwise.errors import ModelError
from layerwise.io import check_finite, count_zeros, load, load_into, load_tokenizer, saved_report
from layerwise.io.places import loader_of
from layerwise.io.weights import check_file, weight_files
from models import small_llama


def llama() -> LlamaForCausalLM:
    return small_llama(num_key_value_heads=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "llama"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(folder: Path | str, **options: object) -> str:
    with pytest.raises(ModelError) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_loads_the_same_weights_in_evaluation_mode(folder):
    model = load(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    for (name, ours), theirs in zip(model.state_dict().items(), llama().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_auto_is_the_stored_one_and_can_be_chosen(folder, tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert load(tmp_path / "half", dtype="float32").dtype == torch.float32
    assert load(folder, dtype=torch.float16).dtype == torch.float16
    assert 'dtype "int3"' in message(folder, dtype="int3")


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
CLIP = CLIPConfig(text_config=TINY | {"vocab_size": 32}, vision_config=TINY | IMAGE)


@pytest.mark.parametrize(
    ("build", "config", "loader"),
    [
        (T5ForConditionalGeneration, T5, "AutoModelForSeq2SeqLM"),
        (ViTForImageClassification, ViTConfig(**TINY, **IMAGE), "AutoModelForImageClassification"),
        (CLIPModel, CLIP, "AutoModel"),
    ],
    ids=["t5", "vit", "clip"],
)
def test_the_stock_class_is_chosen_from_the_architecture(build, config, loader, tmp_path):
    model = build(config)
    model.save_pretrained(tmp_path / "model")
    assert loader_of(tmp_path / "model").class_name == loader
    assert type(load(tmp_path / "model")) is type(model)


def test_diffusers_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "sample_size": 4}
    model = diffusers.DiTTransformer2DModel(**sizes, num_layers=1, num_embeds_ada_norm=10)
    model.bfloat16().save_pretrained(tmp_path / "dit")
    again = load(tmp_path / "dit")
    assert type(again) is type(model)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    edit(tmp_path / "dit/config.json", _class_name="DiTTransformer9DModel")
    assert 'diffusers has no class "DiTTransformer9DModel"' in message(tmp_path / "dit")


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "no/such/model", "no\\such", Path("nowhere")])
def test_a_path_that_does_not_exist(name):
    assert "no such folder" in message(name)


def test_a_file_is_not_a_folder(folder):
    assert "is a file" in message(folder / "config.json")


def test_a_hub_name_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in message("someone/surely-not-in-the-cache")


def test_the_hub_is_never_asked_for_pickles_or_code_unless_allowed(folder, monkeypatch):
    asked = []

    def snapshot(name, *, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert isinstance(load("someone/llama"), LlamaForCausalLM)
    load("someone/llama", remote_code=True)
    assert not [pattern for pattern in asked[0] if pattern.endswith((".py", ".bin", ".pt", "*"))]
    assert "*.py" in asked[1]


def test_demo_is_the_model_inside_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert "lacks its demo model" in message("demo")
    folder.rename(tmp_path / "demo_model")
    assert isinstance(load("demo"), LlamaForCausalLM)


def test_a_folder_without_config(tmp_path):
    assert "no config.json" in message(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    assert f"Give one of its models: {tmp_path / 'transformer'}" in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"), [("{not json", "not valid JSON"), ("[1]", "not a list"), ("{}", '"architectures"')]
)
def test_a_config_that_is_none(folder, text, says):
    (folder / "config.json").write_text(text)
    assert says in message(folder)


def test_an_unknown_architecture_names_the_nearest(folder):
    edit(folder / "config.json", architectures=["LLamaForCausalLM"])
    assert 'Did you mean "LlamaForCausalLM"?' in message(folder)
    edit(folder / "config.json", architectures=["Mine"], auto_map={"AutoModelForCausalLM": "mine.Mine"})
    assert "remote_code=True" in message(folder)


def test_pickled_weights_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "a pickle can run any code" in message(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "no weights in it" in message(folder)


def test_an_unusual_name_of_the_weights_is_named(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "weights are named weights.safetensors" in message(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert message(folder).startswith(f"{path}: truncated")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\x00" * 8 + data[8:],
        lambda data: data[:8] + b"x" * 20 + data[28:],
        lambda data: data.replace(b'"F32"', b'"F16"', 1),
        lambda data: data.replace(b'"shape":[16]', b'"shape":[61]', 1),
        lambda data: data + b"more",
    ],
    ids=["no header", "not json", "dtype", "shape", "too long"],
)
def test_a_corrupt_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    text = message(folder)
    assert text.startswith(str(path))
    assert "corrupt" in text


def test_missing_shards_are_named_from_the_index(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in weight_files(tmp_path)] == shards
    (tmp_path / shards[1]).unlink()
    text = message(tmp_path)
    assert f"1 of {len(shards)} weight files" in text
    assert shards[1] in text


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in message(folder)


def test_a_head_that_the_model_does_not_use_is_told_and_left(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "cls.seq_relationship.weight": torch.zeros(2, 2)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.warns(UserWarning, match=r"not used by this model: cls\.seq_relationship\.weight"):
        load(folder)


def test_weights_that_do_not_belong_to_the_config(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    assert "no place in the model" in message(folder)
    assert "model.layers.1." in message(folder)
    edit(folder / "config.json", num_hidden_layers=3)
    assert "9 weights that config.json asks for" in message(folder)
    edit(folder / "config.json", num_hidden_layers=2, intermediate_size=48)
    assert "is [16, 32], config.json makes it [16, 48]" in message(folder)


def test_loading_leaves_the_libraries_as_they_were(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.initial_seed()
    load(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.initial_seed()) == before


def test_an_absent_device_is_one_line(folder):
    assert 'device "nowhere"' in message(folder, device="nowhere")


def test_tokenizer_absent_or_broken(folder):
    with pytest.raises(ModelError, match="no tokenizer in it"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_names_the_parameter_and_counts(bad):
    model = llama()
    check_finite(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, :5] = bad
    with pytest.raises(ModelError, match=r'"model.layers.1.mlp.up_proj.weight" has 5 of 512 values'):
        check_finite(model)


def test_load_into_a_module_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_file(
        {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4), "1.bias": torch.zeros(4)},
        tmp_path / "model.safetensors",
    )
    assert load_into(model, tmp_path)[1].weight.sum() == 16
    with pytest.raises(ModelError, match=r'"0.bias" of shape \[4\] is of shape \[3\] in the model'):
        load_into(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    untied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = untied[0].weight.clone()
    with pytest.raises(ModelError, match=r"1 weights of the model are not in the files \(1.weight\)"):
        load_into(untied, tmp_path)
    assert torch.equal(untied[0].weight, before)


def test_zeros_are_counted_in_the_file(tmp_path):
    save_file(
        {"a": torch.tensor([[0.0, 1.0, -0.0]]), "b": torch.zeros(3), "c": torch.zeros(2, 2).int()},
        tmp_path / "model.safetensors",
    )
    assert count_zeros(tmp_path) == {"a": (2, (1, 3)), "b": (3, (3,))}
    assert saved_report(tmp_path).zeros == 2  # of matrices


def test_the_header_tells_what_the_file_holds(folder):
    path = folder / "model.safetensors"
    described = {tensor.name: (tensor.shape, tensor.bytes) for tensor in check_file(path)}
    assert described == {name: (tuple(t.shape), t.numel() * 4) for name, t in load_file(path).items()}


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "layerwise.json", "config.json"])
def test_json_nested_without_end_is_one_line(folder, name):
    deep = b"[" * 200_000
    (folder / name).write_bytes(len(deep).to_bytes(8, "little") + deep if name.endswith("safetensors") else deep)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
