"""The command line on an image classifier: images in, accuracy out."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from layerwise.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained("model")
    draw = np.random.default_rng(0)
    np.savez("images.npz", images=draw.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8), labels=np.arange(12) % 3)
    return tmp_path


def test_images_prune_and_judge_a_classifier(here, capsys):
    assert (
        main(
            ["compress", "model", "--data", "images.npz", "--samples", "8", "--sparsity", "0.5", "-o", "out", "--quiet"]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", "out", "--against", "model", "--data", "images.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 12
    assert len({found["protocol"]["model"], found["protocol"]["dense_model"]}) == 2
    assert 0 <= found["top1"] <= 1
    assert 0 <= found["agreement"] <= 1
    assert found["files"]["model"]["zeros"] > found["files"]["dense"]["zeros"]
    assert (here / "out" / "model.safetensors").stat().st_mode & 0o777 == (
        here / "out" / "config.json"
    ).stat().st_mode & 0o777


def test_a_classifier_asks_for_images(here, capsys):
    assert main(["compress", "model", "-o", "out"]) == 2
    assert "FOLDER of images" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize("option", [["--tokens", "9"], ["--latency"], ["--bos-every-window"], ["--tasks", "t.yaml"]])
def test_what_a_classifier_has_no_use_for_is_refused(here, capsys, option):
    more = [] if option[0] == "--tasks" else ["--data", "images.npz"]
    assert main(["evaluate", "model", *more, *option]) == 2
    assert re.search("an image classifier", capsys.readouterr().err)


def test_a_method_with_a_loss_takes_the_labels(here, capsys):
    plan = "plan model --method snip-ratio --sparsity 0.5 --data images.npz --samples 8 -o plan.yaml".split()
    assert main([*plan, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["budget"]["achieved"] == pytest.approx(0.5, abs=1e-4)
    assert len({round(entry["prune"]["sparsity"], 2) for entry in found["layers"].values()}) > 1
    with np.load(here / "images.npz") as data:
        np.savez(here / "bare.npz", images=data["images"])
    plan[plan.index("images.npz")] = "bare.npz"
    assert main([*plan, "--force"]) == 2
    assert "needs labels" in capsys.readouterr().err


def test_what_prepares_the_images_goes_with_the_model(here, capsys):
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("model")
    compress = "compress model --data images.npz --samples 8 --method erk --solver wanda -o out --quiet"
    assert main(compress.split()) == 0
    hashes = []
    for model in ("model", "out"):
        capsys.readouterr()
        assert main(["evaluate", model, "--data", "images.npz", "--json"]) == 0
        hashes.append(json.loads(capsys.readouterr().out)["protocol"]["hash"])
    assert hashes[0] == hashes[1]
    np.savez("grey.npz", images=np.zeros((4, 8, 8, 1), dtype=np.uint8), labels=np.arange(4) % 3)
    assert main(["evaluate", "out", "--data", "grey.npz"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "image processor does not take these images" in err
