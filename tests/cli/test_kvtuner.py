"""`--method kvtuner` on the command line: the front is shown, the plan is written, a search goes on, what is useless is refused."""

import json

import pytest

from layerwise.cache import QuantizedKVCache
from layerwise.cli import main
from layerwise.io import load
from layerwise.plan import Plan

DATA = "--data text.txt --samples 8 --length 32".split()
SMALL = (
    "--method kvtuner --bits 5.5 --set trials=14 --set judged=64".split()
)  # heads of 16 channels: scales take 2 bits


def test_the_front_is_shown_and_the_plan_written(here, capsys):
    assert main(["plan", "model", *SMALL, *DATA, "-o", "plan.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "K8V8" in out
    assert "on the front" in out
    assert "chosen" in out
    assert "layerwise evaluate model --plan plan.yaml" in out
    assert "weights become zero" not in out
    assert "data the search did not see" in err
    plan = Plan.load("plan.yaml")
    pairs = [(entry.cache.key_bits, entry.cache.value_bits) for entry in plan.layers.values()]
    assert sum(map(sum, pairs)) / 2 / len(pairs) + 2 <= 5.5
    assert QuantizedKVCache.from_plan(plan, load("model").config).pairs == tuple(pairs)
    assert sorted(path.name for path in here.iterdir()) == [
        "model",
        "plan.yaml",
        "text.txt",
    ]  # the search's file is gone
    assert main(["plan", "model", "--edit", "plan.yaml"]) == 0
    assert f"K{pairs[0][0]}V{pairs[0][1]}" in capsys.readouterr().out


def test_the_result_as_json(here, capsys):
    assert main(["plan", "model", *SMALL, *DATA, "--levels", "2,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"pairs", "bits", "true", "nominal", "loss", "unseen", "uniform"} == found["tried"][0].keys()
    assert all(bits in (2, 4) for one in found["tried"] for pair in one["pairs"] for bits in pair)
    assert found["plan"]["method"]["levels"] == "2,4"


def test_a_storage_keeps_the_search_for_the_next_command(here, capsys):
    command = ["plan", "model", *SMALL, *DATA, "--json", "--storage", "shared.json"]
    assert main(command) == 0
    first, size = json.loads(capsys.readouterr().out), (here / "shared.json").stat().st_size
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert (here / "shared.json").stat().st_size < 1.1 * size  # no trial was added
    assert len(first["tried"]) <= 14 + 9  # uniform pairs are measured, whatever the cap


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--method kvtuner --sparsity 0.5", ["kvtuner takes no --sparsity"]),
        ("--method kvtuner --pattern 2:4", ["kvtuner takes no --"]),
        ("--method kvtuner --include *.mlp.*", ["--include", "for attentions, not for weights"]),
        ("--method kvtuner --set mode=channel", ["give per-token or kivi"]),
        ("--method kvtuner --bits 1", ["4 to 10 are feasible with levels 2,4,8"]),
        ("--method kvtuner --bits 5 --set group=5", ["heads of 16 channels do not split into groups of 5"]),
        ("--method kvtuner --bits 5 --set bits=4", ["--bits and --set bits=", "twice"]),
        ("--method kvtuner --levels 3", ["some of 2,4,8,16"]),
        ("--method erk --bits 4", ["erk takes no --bits"]),
        ("--method erk --levels 2", ["erk takes no --levels"]),
        ("--method erk --storage x", ["--storage", "searches in no storage"]),
        ("--method kvtuner --storage .", ["cannot be used"]),
        ("--edit plan.yaml --bits 4", ["--bits", "--edit"]),
        ("--edit plan.yaml --levels 4 --storage x", ["--levels", "--storage", "--edit"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(here, capsys, more, words):
    given = more.split()
    data = DATA if "kvtuner" in given else []
    assert main(["plan", "model", *given, *data, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert sorted(path.name for path in here.iterdir()) == ["model", "text.txt"]
