"""Commands that only look, the comparison and the demo, on a tiny model."""

import json
import re

import pytest

from layerwise.cli import main
from layerwise.methods import METHODS
from layerwise.plan import Plan
from layerwise.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("same_process")


def as_json(capsys, *args):
    capsys.readouterr()
    assert main([*args, "--json", *([] if args[0] in ("methods", "diff") else ["-q"])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


COMMANDS = "methods inspect plan compress evaluate speed compare diff demo".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_says_every_option(capsys, command):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Example:" in out
    assert f"layerwise {command}" in out
    # every option has words beside it
    assert not re.search(r"^│ +--\w[\w-]*( +-\w)?( +<?[A-Z]+>?)? +│$", out, re.MULTILINE)


def test_help_of_the_whole_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^│ {command} +[A-Z]", out, re.MULTILINE) for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"layerwise \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_methods_lists_all(here, capsys):
    found = as_json(capsys, "methods")
    assert found["methods"].keys() == METHODS.keys()
    assert found["solvers"].keys() == SOLVERS.keys()
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(METHODS[name].summary.split()[0] in out for name in METHODS)


def test_inspect_shows_a_score_of_every_block(here, capsys):
    drawn = ("--data", "text.txt", "--samples", "2", "--length", "16")
    found = as_json(capsys, "inspect", "model", "--score", "outlier-ratio", *drawn)
    assert set(found["scores"]) == {layer["block"] for layer in found["layers"]}
    by_layer = as_json(capsys, "inspect", "model", "--score", "snip", *drawn)
    assert set(by_layer["scores"]) == {layer["name"] for layer in found["layers"]}
    assert main(["inspect", "model", "--score", "outlier-rato", "--data", "text.txt"]) == 2
    assert 'Did you mean "outlier-ratio"?' in capsys.readouterr().err


@pytest.mark.parametrize("score", ["zeroth-order", "first-order"])
def test_inspect_shows_scores_by_the_loss(here, capsys, score):
    words = f"inspect model --score {score} --data text.txt --samples 2 --length 16"
    found = as_json(capsys, *words.split())
    assert set(found["scores"]) == {layer["block"] for layer in found["layers"]}
    assert min(found["scores"].values()) > 0
    assert main(words.split()) == 0
    assert len(re.findall(r"^model\.layers\.\d", capsys.readouterr().out, re.MULTILINE)) == 3


def test_plan_shows_the_notes_of_the_method(here, capsys, monkeypatch):
    def nothing(model, data, structure, **_):
        return {layer.name: 0.0 for layer in structure}

    monkeypatch.setattr("layerwise.methods.ecoflap.zeroth_order_gradient", nothing)
    words = "plan model --method ecoflap --set samples=2 --data text.txt --samples 2 --length 16".split()
    assert main(words) == 0
    assert "note: all 3 scores are 0, which says nothing: uniform." in capsys.readouterr().err
    assert as_json(capsys, *words)["plan"]["notes"] == ["all 3 scores are 0, which says nothing: uniform."]


def test_inspect_counts_layers_and_zeros(here, capsys):
    found = as_json(capsys, "inspect", "model")
    assert found["stacks"] == {"model.layers": 3}
    assert len(found["layers"]) == 21
    assert {layer["zeros"] for layer in found["layers"]} == {0}
    assert main("compress model --data text.txt --samples 4 --length 32 --sparsity 0.25 -o out -q".split()) == 0
    pruned = as_json(capsys, "inspect", "out", "--include", "*.mlp.*")
    assert [layer["zeros"] for layer in pruned["layers"]] == [32 * 48 // 4] * 9
    assert main(["inspect", "model", "--layers"]) == 0
    assert "model.layers.2.mlp.down_proj" in capsys.readouterr().out


def test_plan_writes_what_it_prints(here, capsys):
    found = as_json(capsys, "plan", "model", "--method", "erk", "--sparsity", "0.6", "-o", "plan.yaml")
    assert Plan.load(here / "plan.yaml").to_dict() == found["plan"]
    assert found["plan"]["budget"]["achieved"] == pytest.approx(0.6, abs=1e-4)
    assert main("plan model --method owl --data text.txt --samples 4 --length 32".split()) == 0
    assert len(re.findall(r"^model\.layers\.\d", capsys.readouterr().out, re.MULTILINE)) == 3  # a bar for each block


def test_diff_names_what_changed(here, capsys):
    assert main("plan model --sparsity 0.6 -o a.yaml -q".split()) == 0
    assert main("plan model --sparsity 0.7 -o b.yaml -q".split()) == 0
    changes = as_json(capsys, "diff", "a.yaml", "b.yaml")
    assert {"layer": None, "field": "budget.sparsity", "before": 0.6, "after": 0.7} in changes
    assert len({change["layer"] for change in changes if change["layer"]}) == 21
    assert main(["diff", "a.yaml", "a.yaml"]) == 0
    assert capsys.readouterr().out == "The plans say the same.\n"


def test_evaluate_against_itself_is_no_change(here, capsys):
    found = as_json(capsys, *"evaluate model --against model --data text.txt --tokens 640".split())
    assert found["kl"] == 0
    assert found["top1"] == 1
    assert found["perplexity"] == found["dense_perplexity"]
    assert found["tokens"] == 10 * 63  # ten windows of the model's 64 positions
    assert found["files"]["model"]["bytes"] == (here / "model" / "model.safetensors").stat().st_size


COMPARE = "compare model --data text.txt --samples 4 --length 32 --tokens 640".split()


def test_compare_has_the_controls_and_the_protocol(here, capsys):
    found = as_json(capsys, *COMPARE, *"--methods owl --sparsity 0.5,0.6 --seeds 2 --solver wanda,magnitude".split())
    cells = [(one["solver"], one["sparsity"], one["method"], one["seed"]) for one in found["cells"]]
    assert cells == [
        (solver, sparsity, method, seed)
        for solver in ("wanda", "magnitude")
        for sparsity in (0.5, 0.6)
        for method in ("uniform", "random", "owl")
        for seed in (0, 1)
    ]
    assert all(abs(one["achieved"] - one["sparsity"]) < 1e-4 for one in found["cells"])
    assert len(found["verdicts"]) == 4
    assert "text.txt" in found["protocol"]["measured on"]
    # magnitude looks at no data and uniform draws nothing: the same model for both seeds
    first, second = (
        one
        for one in found["cells"]
        if (one["solver"], one["sparsity"], one["method"]) == ("magnitude", 0.5, "uniform")
    )
    assert first["perplexity"] == second["perplexity"]


def test_compare_solvers_in_a_pattern_without_the_random_control(here, capsys):
    assert main([*COMPARE, *"--methods uniform --solver magnitude,wanda --pattern 2:4 --json".split()]) == 0
    out, err = capsys.readouterr()
    cells = json.loads(out)["cells"]
    assert [(one["method"], one["solver"], one["achieved"]) for one in cells] == [
        ("uniform", "magnitude", 0.5),
        ("uniform", "wanda", 0.5),
    ]
    assert "no random control" in err


@pytest.mark.parametrize("name", ["table.md", "table.html"])
def test_compare_writes_a_report(here, capsys, name):
    assert main([*COMPARE, "--methods", "erk", "-o", name]) == 0
    out = capsys.readouterr().out
    text = (here / name).read_text()
    for word in ("dense", "uniform", "random", "erk", "perplexity", "hash"):
        assert word in out
        assert word in text
    assert sorted(path.name for path in here.iterdir()) == sorted(["model", "text.txt", name])


def test_demo_does_all_of_it(here, capsys):
    demo = "demo --model model --data text.txt --samples 4 --tokens 640".split()
    found = as_json(capsys, *demo)
    assert len(found["cells"]) == 8
    assert all(abs(one["achieved"] - 0.6) < 1e-4 for one in found["cells"])
    assert found["continuations"].keys() == {"dense", "pruned"}
    folder = here / "layerwise-demo"
    assert (folder / "sparsities.png").read_bytes().startswith(b"\x89PNG")
    assert "owl" in (folder / "report.html").read_text()
    assert Plan.load(folder / "plan.yaml").method["name"] in ("uniform", "erk", "owl")  # never the random control
    assert main(demo) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*demo, "--force"]) == 0
    out = capsys.readouterr().out
    for word in ("dense", "uniform", "random", "erk", "owl", "wanda", "sparsegpt", "block 2", "Saved:", "dense writes"):
        assert word in out
