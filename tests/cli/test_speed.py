"""`layerwise speed`: layer by layer, for people and for programs, and what cannot be timed."""

import json

import pytest
import torch

import layerwise
from layerwise.cli import main
from models import MODELS
from quantized import quantized


@pytest.fixture
def pruned(here):
    model = layerwise.load("model")
    layerwise.compress(model, layerwise.methods.Uniform(sparsity=0.9).plan(model), solver=layerwise.solvers.Magnitude())
    model.save_pretrained("model")
    return here


def as_json(capsys, *args):
    capsys.readouterr()
    assert main(["speed", *args, "--seconds", "0.005", "--device", "cpu", "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys, *args):
    capsys.readouterr()
    assert main(["speed", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def test_every_layer_with_its_form_and_times(pruned, capsys):
    found = as_json(capsys, "model", "--batch", "3", "--length", "2")
    assert found["model"] == "model"
    assert len(found["layers"]) == 22  # 3 blocks of 7, and the head
    first = found["layers"][0]
    assert (first["name"], first["shape"], first["rows"]) == ("model.layers.0.self_attn.q_proj", [32, 32], 6)
    assert first["density"] == pytest.approx(0.1, abs=0.01)
    assert first["dense_ms"] > 0
    assert set(first["tried"]) | set(first["refused"]) >= {"narrow", "gather", "csr", "bsr", "2:4"}
    assert found["protocol"]["inputs"] == "input_ids 3 × 2"
    assert sum(found["forms"].values()) == 22
    assert found["layers"][-1]["why"] == "no zeros"


def test_a_table_for_people(pruned, capsys):
    capsys.readouterr()
    assert main(["speed", "model", "--seconds", "0.005", "--device", "cpu", "--exclude", "*.mlp.*"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].split()[:5] == ["layer", "shape", "zeros", "form", "dense"]
    assert sum("excluded" in line for line in out.splitlines()) == 9
    assert "measured with: device cpu, dtype float32" in " ".join(out.split())


def test_codes_of_a_packed_folder_are_tried(here, capsys, same_process):
    model = layerwise.load("model", dtype="bfloat16")
    codes = quantized(model, lambda name, index: (4, 32, True) if "gate" in name else None)
    layerwise.save(model, "packed", codes=codes, tokenizer=layerwise.load_tokenizer("model"))
    found = as_json(capsys, "packed")
    gates = [layer for layer in found["layers"] if "gate" in layer["name"]]
    assert all("int4 weights" in layer["tried"] for layer in gates), gates[0]["refused"]
    others = {layer["refused"]["int4 weights"] for layer in found["layers"] if "gate" not in layer["name"][-9:]}
    assert others == {"its weights are not codes"}


def test_rounding_is_asked_for(here, capsys):
    assert "int8" in as_json(capsys, "model", "--rounding")["layers"][0]["tried"]
    assert "not asked for" in as_json(capsys, "model")["layers"][0]["refused"]["int8"]


def test_an_image_classifier(here, capsys):
    model = MODELS["vit"]()
    model.save_pretrained("vit")
    found = as_json(capsys, "vit", "--batch", "2")
    assert found["protocol"]["inputs"].startswith("pixel_values 2 × 3 ×")
    assert "--length: not used, since images have no length" in refused(capsys, "vit", "--length", "3")


def test_requests_that_cannot_be_carried_out(here, capsys):
    assert "the model's longest input is 64 tokens" in refused(capsys, "model", "--length", "65")
    assert 'exclude "*.mpl.*" matches no layer' in refused(capsys, "model", "--exclude", "*.mpl.*")
    assert 'device "nowhere"' in refused(capsys, "model", "--device", "nowhere")
    assert "--batch" in refused(capsys, "model", "--batch", "0")
    model = MODELS["t5"]()
    model.save_pretrained("t5")
    assert "layerwise.fastest(model, inputs)" in refused(capsys, "t5")
    model = layerwise.load("model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained("model")
    assert "NaN or infinite" in refused(capsys, "model")
    config = json.loads((here / "model/config.json").read_text())
    entry = {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}
    (here / "model/config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    assert '"sparse-24-bitmask", which compressed-tensors dropped' in refused(capsys, "model")
