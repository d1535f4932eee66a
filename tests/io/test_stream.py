"""Streaming: the same bits as a model in memory, and memory for one block instead of all."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from layerwise.engine import Settings, compress, walk
from layerwise.errors import ConfigError, ModelError
from layerwise.io import save
from layerwise.io.stream import load_streamed, save_streamed
from layerwise.passes import collect_dense
from layerwise.plan import Plan, Prune
from layerwise.shrink import shrink
from layerwise.solvers import Wanda
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches, call
from models import MODELS, inputs_for

STREAMABLE = ["llama", "qwen2", "gemma3", "phi3", "gpt2", "opt", "t5"]


def half(structure):
    return Plan(layers={layer.name: Prune(sparsity=0.5) for layer in structure.layers})


@pytest.mark.parametrize("name", STREAMABLE)
def test_streamed_and_in_memory_give_the_same_bits(tmp_path, name):
    whole = MODELS[name]().eval()
    whole.save_pretrained(tmp_path / "dense")
    data = Batches(tuple(inputs_for(name, whole, seed=seed) for seed in range(2)), {})
    plan = half(structure_of(whole))
    compress(whole, plan, solver=Wanda(), data=data)

    streamed = load_streamed(tmp_path / "dense")
    assert any(parameter.is_meta for parameter in streamed.parameters())
    settings = Settings(work=str(tmp_path / "work"))
    for number, _ in enumerate(walk(streamed, plan, Wanda(), data, settings=settings)):
        if number == 4:  # killed on the way
            break
    again = load_streamed(tmp_path / "dense")
    compress(again, plan, solver=Wanda(), data=data, settings=settings)
    out = tmp_path / "out"
    out.mkdir()
    save_streamed(again, out)
    loaded = type(whole).from_pretrained(out).eval()
    expected = whole.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(call(loaded, data[0]).logits, call(whole, data[0]).logits)


def test_scores_of_a_streamed_model_are_those_of_the_whole_one(tmp_path):
    whole = MODELS["llama"]().eval()
    whole.save_pretrained(tmp_path)
    data = Batches((inputs_for("llama", whole),), {})
    streamed = load_streamed(tmp_path)
    for (_, a), (_, b) in zip(
        collect_dense(whole, structure_of(whole), data),
        collect_dense(streamed, structure_of(streamed), data),
        strict=True,
    ):
        assert all(torch.equal(a[name][0].squares, b[name][0].squares) for name in a)


def test_dtype_can_change_on_the_way(tmp_path):
    whole = MODELS["llama"]().eval()
    whole.save_pretrained(tmp_path / "dense")
    streamed = load_streamed(tmp_path / "dense", dtype=torch.bfloat16)
    (tmp_path / "out").mkdir()
    save_streamed(streamed, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight.bfloat16())


def test_a_streamed_model_needs_a_work_folder(tmp_path):
    whole = MODELS["llama"]().eval()
    whole.save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path)
    with pytest.raises(ConfigError, match="work folder"):
        compress(
            streamed, half(structure_of(streamed)), solver=Wanda(), data=Batches((inputs_for("llama", whole),), {})
        )


def test_files_with_other_names_are_refused(tmp_path):
    whole = MODELS["mixtral"]().eval()  # saved expert by expert, built fused
    whole.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="do not name their tensors as the modules do"):
        load_streamed(tmp_path)


@pytest.mark.parametrize(("keep", "mode"), [("mlp", "auto"), ("self_attn", "auto"), ("self_attn", "remote-code")])
def test_widths_of_each_layer_are_refused(keep, mode, tmp_path):
    model = MODELS["llama"]()
    shrink(model, {f"model.layers.1.{keep}": [1]})
    save(model, tmp_path / "out", mode=mode, verify=False)
    with pytest.raises(ModelError, match=r"widths of their own; load it whole \(without --stream\)"):
        load_streamed(tmp_path / "out")


def test_code_in_the_folder_is_not_run_and_not_asked_about(tmp_path, monkeypatch):
    MODELS["llama"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "not_in_transformers", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(ModelError) as caught:
        load_streamed(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


SCRIPT = """
import json, sys, torch
from layerwise.engine import Settings, compress
from layerwise.io.stream import load_streamed, save_streamed
from layerwise.plan import Plan, Prune
from layerwise.shrink import shrink
from layerwise.solvers import Wanda
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
import transformers
def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
folder, out, how = sys.argv[1:]
transformers.AutoConfig.from_pretrained(folder)
base = status("VmRSS")
model = load_streamed(folder) if how == "streamed" else transformers.LlamaForCausalLM.from_pretrained(folder).eval()
plan = Plan(layers={layer.name: Prune(sparsity=0.5) for layer in structure_of(model).layers})
ids = torch.arange(256).reshape(4, 64)
data = Batches(tuple({"input_ids": row[None]} for row in ids), {})
compress(model, plan, solver=Wanda(), data=data, settings=Settings(work=out + "/work"))
if how == "streamed":
    save_streamed(model, __import__("pathlib").Path(out))
print(json.dumps(status("VmHWM") - base))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_near_one_block(tmp_path):
    """Weights are 20 blocks. What may be resident: a block, its rows while they are solved, the shard being written."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=20,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = weights - 20 * block
    assert weights > 8 * (block + embeddings)
    used = {}
    for how in ("streamed", "whole"):
        (tmp_path / how).mkdir()
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "dense"), str(tmp_path / how), how],
            capture_output=True,
            text=True,
            check=True,
        )
        used[how] = json.loads(run.stdout.splitlines()[-1])
    assert used["streamed"] < 0.7 * weights, used  # 0.56 to 0.64 over runs: pages of mapped files count, too
    assert used["streamed"] < 0.5 * used["whole"], used


def test_save_sends_a_streamed_model_to_its_own_function(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="save_whole_streamed"):
        save(load_streamed(tmp_path / "dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
