"""Scores of weights alone from the command line: no data, a picture, alphas kept from one command to the next."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.cli import main, screen
from layerwise.cli.planning import alphas_folder
from layerwise.plan import Plan
from tiny import tiny_llama


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(screen, "SOON", 1e9)
    return tmp_path


def as_json(capsys, *args):
    capsys.readouterr()
    assert main([*args, "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)


def test_alphas_are_shown_and_drawn_without_data(here, capsys):
    found = as_json(capsys, *"inspect model --score alpha-hill".split())
    assert set(found["scores"]) == {layer["name"] for layer in found["layers"]}
    assert main("inspect model --score alpha-hill --plot spectra.png".split()) == 0
    out = capsys.readouterr().out
    assert "alpha-hill, mean of the layers of each block (low = keep)" in out
    assert "model.layers.2" in out
    assert (here / "spectra.png").read_bytes().startswith(b"\x89PNG")
    (here / "spectra.png").write_text("mine")
    assert main("inspect model --score alpha-hill --plot spectra.png".split()) == 2
    assert "exists already" in capsys.readouterr().err
    assert (here / "spectra.png").read_text() == "mine"
    assert main("inspect model --score alpha-hill --plot spectra.png --force -q".split()) == 0
    assert (here / "spectra.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", ["--plot a.png", "--score outlier-ratio --plot a.png", "--score alpha-hill --plot a.pdf"]
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(here, capsys, words):
    assert main(["inspect", "model", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


@pytest.mark.parametrize("method", ["farms", "alpha-pruning"])
def test_a_plan_by_tails(here, capsys, method):
    found = as_json(
        capsys, "plan", "model", "--method", method, "--sparsity", "0.7", "--set", "fit=mid", "-o", "plan.yaml"
    )
    plan = Plan.load(here / "plan.yaml")
    assert found["plan"]["method"]["name"] == method
    assert plan.budget.achieved == pytest.approx(0.7, abs=1e-4)
    assert len({round(entry.prune.sparsity, 3) for entry in plan.layers.values()}) > 1


def test_alphas_are_kept_until_the_weights_change(here, capsys, monkeypatch):
    command = "plan model --method farms --set fit=mid".split()
    first = as_json(capsys, *command)["plan"]
    assert len(list((here / "cache/alphas").iterdir())) == 21

    def refuse(*args):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["layerwise.scores.alpha_hill"], "layer_tail", refuse)
        assert as_json(capsys, *command)["plan"] == first
    weights = load_file(here / "model/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].mul_(torch.linspace(0, 2, 32))
    save_file(weights, here / "model/model.safetensors", metadata={"format": "pt"})
    second = as_json(capsys, *command)["plan"]
    assert [name for name in first["scores"] if first["scores"][name] != second["scores"][name]] == [
        "model.layers.0.mlp.up_proj"
    ]


def test_where_alphas_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERWISE_CACHE", "off")
    assert alphas_folder() is None
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    assert alphas_folder() == tmp_path / "alphas"
    monkeypatch.delenv("LAYERWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert alphas_folder() == tmp_path / "xdg/layerwise/alphas"


def test_notes_of_a_plan_are_said(here, capsys):
    assert main("plan model --method farms --sparsity 0.9 --set spread=0.6 --set fit=mid".split()) == 0
    assert "would be above max_sparsity=0.998; the others take their part" in capsys.readouterr().err


def test_progress_is_told_layer_by_layer(here, capsys, monkeypatch):
    monkeypatch.setattr(screen, "SOON", 0.0)
    monkeypatch.setattr(screen, "EVERY", 0.0)
    assert main("plan model --method alpha-pruning".split()) == 0
    assert "Planning with alpha-pruning: 20 of 21 (model.layers.2.mlp.down_proj)" in capsys.readouterr().err
