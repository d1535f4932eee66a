"""Packed folders on the command line: measured as the model in memory; what an engine cannot run is refused before any work."""

import json
import sys

import pytest

from layerwise import engine as engine_room
from layerwise.cli import main
from layerwise.evaluate import perplexity
from layerwise.io import load, load_tokenizer, save
from layerwise.plan import Plan, Quantize
from layerwise.structure import structure_of
from layerwise.tasks import held_out
from models import MODELS
from quantized import quantized

COMPRESS = "compress model -o out --data text.txt --samples 2 --length 32 --plan plan.yaml".split()


def write_plan(model, bits, symmetric=True):
    """The tiny model's 32 and 48 inputs are no multiples of 64: one scale per row."""
    layers = {one.name: Quantize(bits=bits(one.name), group=None, symmetric=symmetric) for one in structure_of(model)}
    Plan(layers=layers).save("plan.yaml")


def test_evaluate_gives_the_perplexity_of_the_model_in_memory(here, capsys):
    model, tokenizer = load("model"), load_tokenizer("model")
    codes = quantized(model, lambda name, index: ((2, 3, 4, 8)[index % 4], 16, index % 3 > 0))
    save(model, "out", tokenizer=tokenizer, codes=codes, verify=False)
    assert main("evaluate out --against model --data text.txt --length 32 --tokens 640 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    own = perplexity(model, held_out("text.txt", tokenizer, length=32, tokens=640)).value
    assert found["perplexity"] == own != found["dense_perplexity"]
    assert found["files"]["model"]["bytes"] < found["files"]["dense"]["bytes"]


def test_what_vllm_cannot_fuse_is_refused_before_any_work(here, capsys):
    write_plan(load("model"), lambda name: 8 if "k_proj" in name else 4)
    assert main([*COMPRESS, "--for", "vllm"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "vllm" in line]
    assert len(lines) == 3  # q, k and v of each block
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn as one" in lines[0]
    assert not (here / "out").exists()


@pytest.fixture
def experts(here):
    """A folder with a tiny Mixtral and the tokenizer of the model."""
    MODELS["mixtral"]().save_pretrained("experts")
    load_tokenizer("model").save_pretrained("experts")
    return here


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_experts_that_an_engine_would_not_find_packed_are_refused_before_any_work(experts, capsys, monkeypatch, engine):
    monkeypatch.setattr(engine_room, "compress", None)
    options = ["-o", "out", "--solver", "round_to_nearest", "--for", engine]
    # groups of 32 and of 64, as they divide the inputs
    assert main(["compress", "experts", *options, "--bits", "4"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "layers (model.layers.0.mlp.experts" in line]
    assert f"{engine}: 4 layers (model.layers.0.mlp.experts.gate_up_proj, " in line
    assert "have one scheme there, and these differ" in line
    layers = {"model.layers.0.mlp.experts.down_proj": Quantize(bits=4, group=None)}
    Plan(layers=layers).save("plan.yaml")
    assert main(["compress", "experts", *options, "--plan", "plan.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"{engine}: 1 layer (model.layers.0.mlp.experts.down_proj)" in said
    assert "--exclude '*.experts*'" in said
    planning = "-o new.yaml --method lwq --bits 6.6 --levels 4,8 --data text.txt --samples 2 --length 32".split()
    assert main(["plan", "experts", *planning, "--for", engine]) == 2
    assert f"{engine}: 4 layers" in capsys.readouterr().err
    assert [path.name for path in experts.iterdir() if path.name.startswith(("out", "new"))] == []


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_without_its_experts_the_model_is_packed_for_the_engine(experts, capsys, engine):
    options = "-o out --json --solver round_to_nearest --bits 4 --set group=32 --set symmetric=true --exclude *.experts*".split()
    assert main(["compress", "experts", *options, "--for", engine]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["saved"]["packed"]["by_bits"] == {"4": 8}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_experts_that_share_a_level_are_packed_for_the_engine(experts, capsys, engine):
    options = "-o out --json --solver round_to_nearest --method lwq --bits 6.6 --levels 4,8 --set score=zd --set group=32".split()
    assert main(["compress", "experts", *options, "--for", engine]) == 0, capsys.readouterr().err
    by_bits = json.loads(capsys.readouterr().out)["saved"]["packed"]["by_bits"]
    assert sum(by_bits.values()) == 8 + 24
    assert set(by_bits) == {"4", "8"}


@pytest.mark.usefixtures("same_process")
def test_without_an_engine_named_unlike_experts_are_solved_and_saved_dense(experts, capsys):
    options = "-o out --solver round_to_nearest --bits 4".split()
    assert main(["compress", "experts", *options]) == 0
    said = capsys.readouterr()
    assert "Else what is solved is saved dense." in said.out + said.err
    assert "8 layers, 8 of 4 bits" in said.out


def test_an_unknown_engine(here, capsys):
    assert main([*COMPRESS, "--for", "llama.cpp"]) == 2
    assert 'target "llama.cpp": give transformers or vllm' in capsys.readouterr().err


def test_the_missing_extra_is_named_before_any_work(here, capsys, monkeypatch):
    write_plan(load("model"), lambda name: 4)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert main(COMPRESS) == 2
    assert "pip install 'layerwise[quant]'" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.usefixtures("same_process")
def test_a_plan_without_bits_may_name_an_engine(here, capsys):
    arguments = "compress model -o out --solver magnitude --sparsity 0.5 --for vllm --json".split()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["saved"]["packed"] is None


@pytest.mark.usefixtures("same_process")
def test_bits_that_are_stored_otherwise_than_planned_are_said(here, capsys):
    pytest.importorskip("compressed_tensors")
    write_plan(load("model"), lambda name: 4, symmetric=False)
    arguments = "compress model -o out --solver round_to_nearest --plan plan.yaml".split()
    assert main([*arguments, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["result"]["nominal_bits"] == 4
    assert set(found["saved"]["widened"].values()) == {5}
    assert found["result"]["stored_bits"] == found["saved"]["packed"]["bits"] > found["result"]["bits"]
    assert main([*arguments, "--force"]) == 0
    assert f"(stored in {found['result']['stored_bits']:.3f}" in " ".join(capsys.readouterr().out.split())
