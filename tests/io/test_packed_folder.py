"""Folders of packed weights: loaded by the stock class in a fresh process, by `load` and block by block; what stays dense says why."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from layerwise.engine import compress
from layerwise.errors import MissingExtra, ModelError, PlanError
from layerwise.evaluate import count_zeros, perplexity
from layerwise.io import load, load_streamed, save, save_whole_streamed, saved_report
from layerwise.passes import at_hand
from layerwise.plan import Plan, Quantize
from layerwise.solvers import GPTQ, HQQ, RoundToNearest
from layerwise.structure import structure_of
from layerwise.tasks import Batches
from models import small_llama
from quantized import quantized, rounded

pytest.importorskip("compressed_tensors")
BITS = (2, 3, 4, 8)


def mixed(name, index):
    return BITS[index % 4], [16, None, 32][index % 3], True


def with_zeros(name, index):
    return 4, 32, False


def llama(dtype=torch.bfloat16, **settings):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    return small_llama(**(sizes | settings)).to(dtype)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_mixed_bits_load_with_the_stock_class_in_a_fresh_process(tmp_path):
    model = llama()
    codes = quantized(model, lambda name, index: None if "1.mlp.down" in name else mixed(name, index))
    saved = save(model, tmp_path / "out", codes=codes)
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.verified.tensors == len(model.state_dict())  # each bit for bit, unpacked by the library
    assert saved.verified.difference is not None
    assert saved.verified.difference < 0.01
    assert saved.report.packed is not None
    assert saved.report.packed.by_bits == {2: 4, 3: 3, 4: 3, 8: 3}
    assert saved.report.notes == ()

    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["version"] == "0.20.0"
    assert config["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(codes)
    assert len(config["config_groups"]) == 12  # of 13 layers the first and the last have one scheme

    again = load(tmp_path / "out")
    assert same(model, again)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not hasattr(again.config, "quantization_config")  # so that it saves as what it is now


def test_the_perplexity_is_that_of_the_model_in_memory(tmp_path):
    model = llama(torch.float32)
    save(model, tmp_path / "out", codes=quantized(model, mixed), verify=False)
    data = Batches(({"input_ids": torch.arange(3, 35)[None]},), {})
    assert perplexity(load(tmp_path / "out"), data).value == perplexity(model, data).value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [GPTQ(), RoundToNearest()], ids=lambda solver: solver.name)
def test_a_reloaded_folder_says_the_same_tokens_as_the_compressed_model(tmp_path, solver, dtype):
    model = llama(dtype, initializer_range=0.3)  # of usual weights the tokens would all be one
    structure = structure_of(model)
    layers = {
        layer.name: Quantize(bits=BITS[place % 4], group=16, symmetric=True)
        for place, layer in enumerate(structure.layers)
    }
    prompt = torch.arange(3, 11)[None]
    said = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(prompt, **said)
    data = Batches(
        tuple({"input_ids": (torch.arange(32) * step)[None] % model.config.vocab_size} for step in (1, 3, 7)), {}
    )
    result = compress(model, Plan(layers=layers), solver=solver, data=data)
    in_memory = model.generate(prompt, **said)
    saved = save(model, tmp_path / "out", codes=result.codes, verify=False)
    assert saved.report.packed is not None
    assert sum(saved.report.packed.by_bits.values()) == len(layers)
    assert torch.equal(load(tmp_path / "out").generate(prompt, **said), in_memory)
    assert not torch.equal(dense, in_memory)
    assert len(set(in_memory[0, 8:].tolist())) > 4


def test_the_plan_beside_the_weights_says_the_bits_that_are_stored(tmp_path):
    model = llama(torch.float32)
    layers = {layer.name: Quantize(bits=4, group=32) for layer in structure_of(model).layers}
    plan = Plan(layers=layers).with_achieved(structure_of(model).layers)
    assert plan.budget.achieved_bits == 4 + 20 / 32
    result = compress(model, plan, solver=HQQ())
    save(model, tmp_path / "out", plan=plan, result=result, codes=result.codes, verify=False)
    assert Plan.load(tmp_path / "out" / "plan.yaml").budget.achieved_bits == 5


def test_no_loading_needs_compressed_tensors(tmp_path):
    """Our reader in a process where the library cannot be imported; saving without the check needs none either."""
    model = llama(torch.float32)
    save(model, tmp_path / "out", codes=quantized(model, mixed), verify=False)
    code = f"""
import sys
sys.modules["compressed_tensors"] = None
from layerwise.io import load, load_streamed
print(sum(float(p.double().sum()) for p in load({str(tmp_path / "out")!r}).parameters()))
load_streamed({str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sum(float(p.detach().double().sum()) for p in model.parameters()))


def test_what_is_counted(tmp_path):
    model = llama()
    save(model, tmp_path / "dense", verify=False)
    codes = quantized(model, lambda name, index: (4, 32, True))
    saved = save(model, tmp_path / "out", codes=codes, verify=False, dense=tmp_path / "dense")
    packed = saved.report.packed
    assert packed is not None
    assert packed.bits == 4.5  # 4 + 16/32
    assert packed.weights == sum(one.values.numel() for one in codes.values())
    assert saved.report.bytes < saved.report.before
    zeros, in_memory = count_zeros(tmp_path / "out"), count_zeros(model)
    assert zeros.zeros == in_memory.zeros
    assert saved.report.zeros == sum(count for name, count in zeros.zeros.items() if len(zeros.shapes[name]) > 1)
    lines = "\n".join(saved.lines())
    assert "14 layers, 14 of 4 bits; 4.500 bits per weight" in lines
    assert "not faster in transformers" in lines
    assert "Zeros do not shrink" not in lines
    facts = json.loads((tmp_path / "out/layerwise.json").read_text())
    assert facts["saved"]["packed"]["by_bits"] == {"4": 14}
    assert facts["saved"]["packed"]["bits"] == 4.5
    assert "compressed-tensors" in facts["versions"]


@pytest.mark.usefixtures("in_this_process")
def test_zeros_are_widened_away_for_transformers(tmp_path):
    model = llama()
    codes = quantized(model, with_zeros)
    solved = {"bits": 4 + 20 / 32, "nominal_bits": 4.0}
    saved = save(model, tmp_path / "out", codes=codes, result=solved)
    assert saved.verified is not None
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert saved.report.packed is not None
    assert set(saved.report.packed.by_bits) == {5}
    assert "stored symmetric with more bits" in saved.report.notes[0]
    assert same(model, load(tmp_path / "out"))
    facts = json.loads((tmp_path / "out/layerwise.json").read_text())
    assert facts["result"] == {**solved, "stored_bits": 5.5}  # 5 + 16/32
    assert facts["saved"]["widened"] == dict.fromkeys(codes, 5)
    assert "| stored_bits | 5.5 |" in (tmp_path / "out/README.md").read_text()
    vllm = save(model, tmp_path / "vllm", codes=codes, result=solved, target="vllm", verify=False)
    assert vllm.report.widened == {}
    assert json.loads((tmp_path / "vllm/layerwise.json").read_text())["result"] == solved


def test_zeros_are_stored_for_vllm(tmp_path):
    model = llama()
    codes = quantized(model, with_zeros)
    saved = save(model, tmp_path / "out", codes=codes, target="vllm")
    assert saved.verified is not None
    assert saved.verified.loader == "layerwise.load"
    assert "transformers cannot load zeros" in saved.verified.words()
    assert saved.report.packed is not None
    assert saved.report.packed.by_bits == {4: 14}
    assert saved.report.packed.bits == 4 + (16 + 4) / 32
    assert same(model, load(tmp_path / "out"))


def test_transformers_cannot_read_zeros_yet(tmp_path):
    """The reason for widening; when this fails, the stock loader can, and zeros may be stored for it, too."""
    model = llama()
    save(model, tmp_path / "out", codes=quantized(model, with_zeros), target="vllm")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.usefixtures("in_this_process")
def test_what_cannot_be_packed_stays_dense_with_a_note(tmp_path):
    model = llama()
    codes = quantized(model, lambda name, index: (4, 32, True))
    names = list(codes)
    codes[names[0]] = replace(codes[names[0]], shift=True)  # zeros are any numbers
    codes[names[1]] = rounded(torch.randn(codes[names[1]].values.shape), 8, None, symmetric=False, dtype=torch.bfloat16)
    model.get_submodule(names[1]).weight.data = codes[names[1]].weight().bfloat16()
    codes["lm_head"] = rounded(model.lm_head.weight, 8, 32, symmetric=True, dtype=torch.bfloat16)
    saved = save(model, tmp_path / "out", codes=codes)
    assert saved.report.packed is not None
    assert saved.report.packed.by_bits == {4: 12}
    notes = "\n".join(saved.report.notes)
    assert f"1 layer ({names[0]}) saved dense: its zeros are no whole codes" in notes
    assert f"1 layer ({names[1]}) saved dense: transformers reads no zeros" in notes
    assert "its weight is shared (model.embed_tokens.weight, lm_head.weight)" in notes
    assert same(model, load(tmp_path / "out"))


def test_layers_that_are_no_linears_stay_dense(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight
    codes = {"transformer.h.0.mlp.c_fc": rounded(weight.T, 4, None, symmetric=True, dtype=torch.float16)}
    saved = save(model, tmp_path / "out", codes=codes, verify=False)
    assert saved.report.packed is None
    assert "saved dense: the format is for linears" in saved.report.notes[0]
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_module_of_ones_own_class_stays_dense(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    saved = save(model, tmp_path / "out", codes=quantized(model, lambda name, index: (4, 32, True)))
    assert "models of transformers" in saved.report.notes[0]


@pytest.mark.parametrize("wrong", ["name", "shape", "changed"])
def test_codes_of_something_else(tmp_path, wrong):
    model = llama()
    codes = quantized(model, lambda name, index: (4, 32, True))
    name = next(iter(codes))
    match wrong:
        case "name":
            codes = {name.replace("q_proj", "q_porj"): codes[name]}
            expected = 'does not have. Did you mean "model.layers.0.self_attn.q_proj"'
        case "shape":
            codes[name] = rounded(torch.randn(4, 32), 4, 32, symmetric=True, dtype=torch.bfloat16)
            expected = r"are \[4, 32\], its weight is \[64, 64\]"
        case _:
            model.get_submodule(name).weight.data[0, 0] += 1
            expected = "its weight is not what its codes give"
    with pytest.raises(ModelError, match=expected):
        save(model, tmp_path / "out", codes=codes, verify=False)
    assert list(tmp_path.iterdir()) == []


def test_the_check_needs_compressed_tensors_and_says_so_first(tmp_path, monkeypatch):
    model = llama()
    codes = quantized(model, lambda name, index: (4, 32, True))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[quant\]'"):
        save(model, tmp_path / "out", codes=codes)
    assert list(tmp_path.iterdir()) == []


def test_vllm_refuses_what_it_cannot_fuse(tmp_path):
    model = llama()
    codes = quantized(model, lambda name, index: (8 if "k_proj" in name else 4, 32, True))
    with pytest.raises(PlanError, match=r"it runs q_proj, k_proj, v_proj of model.layers.0.self_attn as one"):
        save(model, tmp_path / "out", codes=codes, target="vllm")
    assert list(tmp_path.iterdir()) == []


def test_shards_keep_their_names_and_the_index_its_order(tmp_path, monkeypatch):
    model = llama(tie_word_embeddings=False)
    codes = quantized(model, mixed)
    write = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder: write(folder, max_shard_size="30KB"))
    save(model, tmp_path / "out", codes=codes, verify=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert same(model, load(tmp_path / "out"))


def test_block_by_block(tmp_path):
    """A packed folder streamed gives the same weights, can be written dense, and codes of a streamed model are packed."""
    model = llama()
    codes = quantized(model, lambda name, index: (*mixed(name, index)[:2], index != 1))
    save(model, tmp_path / "packed", codes=codes, verify=False)
    streamed = load_streamed(tmp_path / "packed")
    for block in structure_of(streamed, include=["*"]).blocks:
        with at_hand(streamed, block.name):
            for name, tensor in streamed.get_submodule(block.name).state_dict().items():
                assert torch.equal(tensor, model.get_submodule(block.name).state_dict()[name])
    save_whole_streamed(streamed, tmp_path / "dense", dense=tmp_path / "packed")
    assert same(model, load(tmp_path / "dense"))
    assert saved_report(tmp_path / "dense").packed is None
    again = load_streamed(tmp_path / "dense")
    saved = save_whole_streamed(again, tmp_path / "again", dense=tmp_path / "dense", codes=codes)
    assert saved.report.packed == saved_report(tmp_path / "packed").packed
    assert saved.report.widened.keys() == {name for name, one in codes.items() if not one.symmetric} != set()
    assert same(model, load(tmp_path / "again"))


@pytest.mark.parametrize("target", ["Linear", r"re:model\.layers\.\d+\..*"])
def test_patterns_and_classes_of_other_tools_are_read(tmp_path, target):
    model = llama()
    save(model, tmp_path / "out", codes=quantized(model, lambda name, index: (4, 32, True)), verify=False)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    path.write_text(json.dumps(config))
    assert same(model, load(tmp_path / "out"))


def test_a_config_that_does_not_fit_the_files(tmp_path):
    model = llama()
    save(model, tmp_path / "out", codes=quantized(model, lambda name, index: (4, 32, True)), verify=False)
    path = tmp_path / "out/config.json"
    good = path.read_text()
    path.write_text(good.replace('"model.layers.0.self_attn.q_proj",', ""))
    with pytest.raises(
        ModelError, match=r'no group of its quantization_config is for the packed "model.layers.0.self_attn.q_proj"'
    ):
        load(tmp_path / "out")
    path.write_text(good.replace('"num_bits": 4', '"num_bits": "many"'))
    with pytest.raises(ModelError, match="quantization_config cannot be read"):
        load(tmp_path / "out")
    path.write_text(good)
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight_shape"]
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weight_shape is missing"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", ["sparse-bitmask", "sparse-24-bitmask", "marlin-24"])
@pytest.mark.parametrize("where", ["format", "sparsity_config", "config_groups", "compression_config"])
def test_sparse_formats_of_the_past_are_refused_by_name(tmp_path, name, where):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = {"quant_method": "compressed-tensors"}
    entry |= {
        "format": {"format": name},
        "compression_config": {"sparsity_config": {"format": name}},
        "sparsity_config": {"format": "dense", "sparsity_config": {"format": name}},
        "config_groups": {"config_groups": {"group_0": {"targets": ["Linear"], "format": name}}},
    }[where]
    key = "compression_config" if where == "compression_config" else "quantization_config"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: entry}))
    with pytest.raises(ModelError, match=f'stored as "{name}", which compressed-tensors dropped'):
        load(tmp_path)
