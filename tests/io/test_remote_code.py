"""Widths of each layer saved with their modelling file: built, run, saved and loaded again by transformers alone."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from layerwise.errors import ConfigError
from layerwise.io import load, save
from layerwise.io.remote_code import FAMILIES
from layerwise.plan import Quantize
from layerwise.shrink import drop_blocks, shrink
from layerwise.solvers import RoundToNearest
from layerwise.structure import coupled_groups
from models import DECODER, MODELS, inputs_for
from shrinking import drawn, outputs

ALONE = """
import json, sys
sys.modules["layerwise"] = None  # as if it were not installed: importing it would raise
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, out = sys.argv[1:3]
ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
cached, plain = (
    model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
)
decoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
    again = model.lm_head(decoder(input_ids=ids).last_hidden_state)
    again = again * (logits.abs().max() / again.abs().max())  # Gemma 2 and Granite scale or cap their logits after the head
model.save_pretrained(out)
print(json.dumps({
    "name": type(model).__name__, "same": torch.equal(cached, plain), "logits": logits.tolist(), "tokens": cached.tolist(),
    "decoder": float((again - logits).abs().max()),
}))
"""


def small(kind):
    """A tiny random model of this type with four blocks; biases where the family has them."""
    config = transformers.AutoConfig.for_model(kind, **{**DECODER, "num_hidden_layers": 4, "head_dim": 8})
    for flag in ("attention_bias", "mlp_bias"):
        if hasattr(config, flag):
            setattr(config, flag, True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return model


def narrowed(kind, seed=0):
    model = small(kind)
    shrink(model, drawn(coupled_groups(model), seed))
    return model


def alone(folder, out, environment=None):
    """What a process without layerwise makes of it. HF_MODULES_CACHE: nothing is left in the user's cache."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_alone_builds_runs_and_saves_it(kind, tmp_path, modules):
    model = narrowed(kind)
    drop_blocks(model, ["model.layers.1"])
    saved = save(model, tmp_path / "out", mode="remote-code", verify=kind == "llama")
    if kind == "llama":
        assert saved.verified.loader == "transformers.AutoModelForCausalLM (trust_remote_code=True)"
        assert saved.verified.difference == 0
    got = alone(tmp_path / "out", tmp_path / "again")
    ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.tensor(got["logits"]), wanted, rtol=1e-5, atol=1e-5)
    assert got["name"].startswith("Layerwise")
    assert got["same"]
    assert got["tokens"] == model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    if kind not in ("gemma2", "granite"):
        assert got["decoder"] < 1e-4
    # what it saved by its own method is the same folder, its code too
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again"))
    assert one["per_layer_config"] == two["per_layer_config"]
    assert two["auto_map"]["AutoModelForCausalLM"] == one["auto_map"]["AutoModelForCausalLM"]
    assert (tmp_path / "again/modeling_layerwise.py").read_text() == (tmp_path / "out/modeling_layerwise.py").read_text()


def test_layerwise_loads_it_both_ways_and_saves_it_again(tmp_path, modules):
    model = narrowed("llama")
    save(model, tmp_path / "out", mode="remote-code", verify=False)
    batch = inputs_for("llama", model, seed=0)
    stock, remote = load(tmp_path / "out"), load(tmp_path / "out", remote_code=True)
    assert type(stock) is type(model)
    assert type(remote).__name__ == "LayerwiseLlamaForCausalLM"
    for one in (stock, remote):
        assert torch.equal(outputs(one, batch)[0], outputs(model, batch)[0])
    save(stock, tmp_path / "plain", verify=False)  # without the code, nothing points to it
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(outputs(load(tmp_path / "plain"), batch)[0], outputs(model, batch)[0])
    saved = save(remote, tmp_path / "again", mode="remote-code")
    assert saved.verified.difference == 0
    shrink(remote, {group.name: range(8) for group in coupled_groups(remote).groups if group.kind == "channels"})
    assert type(remote).__name__ == "LlamaForCausalLM"
    save(remote, tmp_path / "narrower", verify=False)
    assert [layer.mlp.up_proj.out_features for layer in load(tmp_path / "narrower").model.layers] == [8] * 4


def test_it_is_trained_on(tmp_path, modules):
    model = narrowed("qwen2")
    save(model, tmp_path / "out", mode="remote-code", verify=False)
    remote = load(tmp_path / "out", remote_code=True).train()
    ids = inputs_for("qwen2", remote, seed=0)["input_ids"]
    remote(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in remote.parameters())


def test_packed_weights_go_with_it(tmp_path, modules):
    pytest.importorskip("compressed_tensors")
    model = small("llama")
    shrink(model, {"model.layers.1.mlp": range(32), "model.layers.2.self_attn": [1]})
    solver, codes = RoundToNearest(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            treatment = Quantize(bits=4, group=None, symmetric=True)
            codes[name] = solver.solve([module.weight.data], [treatment], {})[0].codes
            module.weight.data = codes[name].weight()
    saved = save(model, tmp_path / "out", codes=codes, mode="remote-code")
    assert saved.report.packed is not None
    assert saved.verified.loader.startswith("transformers.AutoModelForCausalLM")


def test_stock_loading_does_not_build_another_model(tmp_path, modules):
    save(narrowed("llama"), tmp_path / "out", mode="remote-code", verify=False)
    with pytest.raises(Exception, match="per_layer|per-layer|heterogeneous"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_what_needs_none_and_what_has_none(tmp_path):
    with pytest.raises(ConfigError, match="all blocks of this LlamaForCausalLM are alike"):
        save(MODELS["llama"](), tmp_path / "out", mode="remote-code")
    model = MODELS["gpt2"]()
    shrink(model, {"transformer.h.0.mlp": range(9)})
    with pytest.raises(ConfigError, match="no modelling file for GPT2LMHeadModel; there is one for .*llama, mistral"):
        save(model, tmp_path / "out", mode="remote-code")
    with pytest.raises(ConfigError, match='mode="gguf": give auto or remote-code'):
        save(model, tmp_path / "out", mode="gguf")
    assert not (tmp_path / "out").exists()
