"""Widths of each layer saved with their modelling file: built, run, saved and loaded again by transformers alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from layerwise.errors import ConfigError
from layerwise.io import load, save
from layerwise.io.remote_code import FAMILIES
from layerwise.shrink import cut_hidden, drop_blocks, shrink
from layerwise.structure import coupled_groups
from models import DECODER, MODELS, inputs_for
from quantized import quantized
from shrinking import drawn, outputs

ALONE = """
import json, sys
sys.modules["layerwise"] = None  # as if it were not installed: importing it would raise
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
answers = {}
for kind in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{kind}"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    cached, plain = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    )
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.model(input_ids=ids).last_hidden_state
        own = decoder(input_ids=ids).last_hidden_state
    model.save_pretrained(f"{folder}-again")
    answers[kind] = {
        "name": type(model).__name__, "cached": torch.equal(cached, plain), "logits": logits.tolist(),
        "tokens": cached.tolist(), "decoder": torch.equal(hidden, own),
    }
print(json.dumps(answers))
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
    """Heads and channels cut, each layer its own number."""
    model = small(kind)
    keep = drawn(coupled_groups(model), seed, kinds=("channels",))
    shrink(model, {**keep, "model.layers.0.self_attn": [1], "model.layers.3.self_attn": [0]})
    return model


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """(folder, models by type, what a process without layerwise made of each): one process, since starting it takes seconds."""
    root = tmp_path_factory.mktemp("families")
    models = {kind: narrowed(kind) for kind in FAMILIES}
    for kind, model in models.items():
        drop_blocks(model, ["model.layers.1"])
        save(model, root / kind, mode="remote-code", verify=False)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(root), *models], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return root, models, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Code that is run is copied here, not into the user's cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_alone_builds_and_runs_it(kind, families):
    _, models, answers = families
    model, got = models[kind], answers[kind]
    ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.tensor(got["logits"]), wanted, rtol=1e-5, atol=1e-5)
    assert got["name"] == f"Layerwise{type(model).__name__}"
    assert got["cached"]
    assert got["tokens"] == model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    assert got["decoder"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_its_own_save_writes_the_same_folder(kind, families):
    root, _, _ = families
    out, again = root / kind, root / f"{kind}-again"
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (out, again))
    assert one["per_layer_config"] == two["per_layer_config"]
    assert one["per_layer_config"]["0"] | {"intermediate_size": 0} == {
        "intermediate_size": 0, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    assert two["auto_map"]["AutoModelForCausalLM"] == one["auto_map"]["AutoModelForCausalLM"]
    assert (again / "modeling_layerwise.py").read_text() == (out / "modeling_layerwise.py").read_text()


def test_every_save_is_checked_in_a_fresh_process(tmp_path):
    saved = save(narrowed("llama"), tmp_path / "out", mode="remote-code")
    assert saved.verified.loader == "transformers.AutoModelForCausalLM (trust_remote_code=True)"
    assert saved.verified.difference == 0
    facts = json.loads((tmp_path / "out/layerwise.json").read_text())
    assert facts["loader"] == "transformers.AutoModelForCausalLM"


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


def test_the_residual_stream_may_be_narrower_too(tmp_path, modules):
    model = narrowed("llama")
    cut_hidden(model, range(0, 32, 2))
    save(model, tmp_path / "out", mode="remote-code", verify=False)
    remote, batch = load(tmp_path / "out", remote_code=True), inputs_for("llama", model, seed=0)
    assert remote.model.layers[0].mlp.up_proj.in_features == 16
    assert torch.equal(outputs(remote, batch)[0], outputs(model, batch)[0])


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
    codes = quantized(model, lambda name, index: (4, None, True))
    saved = save(model, tmp_path / "out", codes=codes, mode="remote-code")
    assert saved.report.packed is not None
    assert saved.verified.loader.startswith("transformers.AutoModelForCausalLM")


def test_stock_loading_does_not_build_another_model(tmp_path, modules):
    save(narrowed("llama"), tmp_path / "out", mode="remote-code", verify=False)
    with pytest.raises(Exception, match="mismatched"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    channels = small("llama")
    shrink(channels, {"model.layers.0.mlp": range(9)})
    save(channels, tmp_path / "channels", mode="remote-code", verify=False)
    with pytest.raises(Exception, match="per-layer attribute"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "channels")


def test_what_needs_none_and_what_has_none(tmp_path):
    with pytest.raises(ConfigError, match="all blocks of this LlamaForCausalLM are alike"):
        save(MODELS["llama"](), tmp_path / "out", mode="remote-code")
    model = MODELS["gpt2"]()
    shrink(model, {"transformer.h.0.mlp": range(9)})
    with pytest.raises(ConfigError, match=r"no modelling file for GPT2LMHeadModel; there is one for .*llama, mistral"):
        save(model, tmp_path / "out", mode="remote-code")
    with pytest.raises(ConfigError, match='mode="gguf": give auto or remote-code'):
        save(model, tmp_path / "out", mode="gguf")
    assert not (tmp_path / "out").exists()
