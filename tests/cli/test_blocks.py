"""Blocks of weights from the command line, on an image classifier."""

import json

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from layerwise.cli import main
from layerwise.io import load
from layerwise.plan import Plan


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2,
        num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained("model")
    draw = np.random.default_rng(0)
    np.savez("images.npz", images=draw.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8), labels=np.arange(12) % 3)
    return tmp_path


def grid_of(folder, name, height, width):
    """Which weights of each block are not zero: (block rows, height, block columns, width)."""
    weight = load(folder).get_submodule(name).weight
    rows, columns = weight.shape
    return weight.reshape(rows // height, height, columns // width, width).ne(0)


def test_lpvit_plans_and_the_plan_is_applied_as_it_stands(here, capsys):
    ask = [
        "--method",
        "lpvit",
        "--pattern",
        "block:8x8",
        "--sparsity",
        "0.4",
        "--data",
        "images.npz",
        "--samples",
        "12",
    ]
    assert main(["plan", "model", *ask, "-o", "plan.yaml", "--json"]) == 0
    plan = Plan.load(here / "plan.yaml")
    assert json.loads(capsys.readouterr().out)["plan"] == plan.to_dict()
    assert plan.method["pattern"] == "block:8x8"
    assert {entry.prune.pattern for entry in plan.layers.values()} == {"block(8x8)"}
    assert "by the energy model" in plan.notes[-1]
    for solver in ("magnitude", "sparsegpt"):
        data = [] if solver == "magnitude" else ["--data", "images.npz", "--samples", "12"]
        assert main(["compress", "model", "--plan", "plan.yaml", "--solver", solver, *data, "-o", solver, "-q"]) == 0
        for name, entry in plan.layers.items():
            grid = grid_of(here / solver, name, 8, 8)
            assert grid.any(3).any(1).flatten().tolist() == entry.prune.blocks_kept(grid.numel() // 64)


def test_blocks_of_any_solver_without_a_method(here, capsys):
    assert main(["compress", "model", "--pattern", "block:16x8", "--sparsity", "0.5", "--solver", "sparsegpt",
                 "--data", "images.npz", "--samples", "12", "-o", "out", "-q"]) == 0  # fmt: skip
    name = next(name for name, module in load(here / "out").named_modules() if name.endswith(".0.mlp.fc1"))
    grid = grid_of(here / "out", name, 16, 8)
    assert grid.any(3).any(1).sum() == 8
    assert torch.equal(grid.any(3).any(1), grid.all(3).all(1))


def test_bad_requests_are_one_line(here, capsys):
    ask = ["plan", "model", "--method", "lpvit", "--data", "images.npz", "--samples", "12"]
    for more, words in (
        (["--pattern", "2:4"], "give a block"),
        (["--pattern", "block:64x8"], 'indivisible="dense"'),
        (["--set", "cost=joule"], "give macs, weights, bytes, energy"),
        (["--set", "energy_table=none.yaml"], "cannot be read"),
        (["--set", "energy_table=float"], "give float16, float32, int8"),
    ):
        assert main([*ask, *more]) == 2
        error = capsys.readouterr().err
        assert words in " ".join(error.split())
        assert "Traceback" not in error
    assert main([*ask, "--pattern", "block:8x8", "--max-sparsity", "0.1"]) == 2
    assert "of the macs can go" in capsys.readouterr().err


def test_methods_names_it(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]["lpvit"]
    assert found["needs_data"]
    assert found["settings"]["pattern"] == "block(16x16)"
