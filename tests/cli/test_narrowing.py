"""`layerwise compress` where heads, channels and blocks are cut: what it writes, says, and refuses."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

from layerwise.cli import main
from layerwise.io import load
from layerwise.plan import Plan
from layerwise.scores import unit_costs

DRAW = "--data text.txt --samples 4 --length 32".split()


def parameters(folder):
    return sum(one.numel() for one in load(folder).parameters())


def multiply_adds(model):
    return sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Linear))


@pytest.mark.parametrize(
    "words",
    [
        ["magnitude-width"],
        ["llm-pruner", *DRAW],
        ["flap", *DRAW],
        ["adapt-pruner", *DRAW, "--set", "step=0.1"],
        ["adapt-pruner", *DRAW, "--batch", "2", "--set", "step=0.1", "--set", "batches=1"],
        ["shortgpt", *DRAW],
        ["magnitude-width", "--set", "budget=macs"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_the_model_is_really_smaller(here, same_process, capsys, words):
    before = parameters("model")
    assert main(["compress", "model", "--method", *words, "--parameters", "0.8", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "Win quality back: layerwise recover" in out
    assert ("Loads with layerwise.load" in out) or ("Loads with transformers" in out)
    after = parameters("out")
    more = 0.02 if words[-1] == "budget=macs" else 0  # embeddings, which multiply nothing
    assert 0.5 * before < after <= (0.8 + more) * before
    record = json.loads((here / "out/layerwise.json").read_text())["result"]
    assert record["parameters"] == {"before": before, "after": after}
    smaller, larger = (sum(f.stat().st_size for f in (here / x).glob("*.safetensors")) for x in ("out", "model"))
    assert smaller < larger
    plan = Plan.load(here / "out/plan.yaml")
    assert (
        main(["compress", "model", "--plan", "out/plan.yaml", *(DRAW if words[0] == "flap" else []), "-o", "again"])
        == 0
    )
    assert plan.layers == Plan.load(here / "again/plan.yaml").layers
    assert all(torch.equal(a, b) for a, b in zip(load("again").parameters(), load("out").parameters(), strict=True))


@pytest.mark.parametrize("words", [["magnitude-width"], ["llm-pruner", *DRAW]], ids=lambda words: words[0])
def test_multiply_adds_are_met(here, same_process, capsys, words):
    assert main(["compress", "model", "--method", *words, "--macs", "0.8", "-o", "out"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    before, after = (multiply_adds(load(folder)) for folder in ("model", "out"))
    assert f"{after:,} of {before:,} multiply-adds a token stay ({after / before:.2%})" in said
    assert 0.8 * before - 32 * 3 < after <= 0.8 * before  # less than a channel
    assert Plan.load(here / "out/plan.yaml").budget.flops == 2 * int(0.8 * before)


@pytest.mark.parametrize("words", [["magnitude-width"], ["llm-pruner", *DRAW]], ids=lambda words: words[0])
def test_a_time_is_met_and_measured_again(here, same_process, capsys, monkeypatch, words):
    """On a clock that ticks once for each weight that a token meets, and is 5 % slow once the model is cut."""
    dense = multiply_adds(load("model"))

    def ticks(run):
        held = inspect.getclosurevars(run).nonlocals
        if "matrix" in held:
            return held["matrix"].numel() * 1e-6
        found = multiply_adds(held["model"])
        return found * 1e-6 if found == dense else found * 1.05e-6

    monkeypatch.setattr(unit_costs, "_median", ticks)
    assert main(["compress", "model", "--method", *words, "--latency", "0.8", "--set", "rows=4", "-o", "out"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    after = multiply_adds(load("out"))
    assert 0.8 * dense - 32 * 3 < after <= 0.8 * dense
    assert f"{after / 1000:.3f} of {dense / 1000:.3f} ms stay ({after / dense:.2%})" in said
    share = 1.05 * after / dense
    assert (
        f"a forward pass of 4 token(s) takes {1.05 * after / 1000:.2f} ms, {dense / 1000:.2f} before: {share:.1%}, 80.0% was asked for"
        f" ({share - 0.8:+.1%})" in said
    )


@pytest.mark.parametrize("method", ["llm-pruner", "flap"])
def test_one_width_for_all_blocks_is_a_stock_folder(here, same_process, capsys, method):
    words = ["--method", method, *DRAW, "--parameters", "0.8", "--uniform-width", "--multiple-of", "8"]
    assert main(["compress", "model", *words, "-o", "out"]) == 0
    assert "Loads with transformers" in capsys.readouterr().out
    config = json.loads((here / "out/config.json").read_text())
    assert config["intermediate_size"] % 8 == 0
    assert parameters("out") <= 0.8 * parameters("model")


def test_a_modelling_file_goes_along_where_it_is_asked_for(here, same_process, capsys):
    words = ["--method", "llm-pruner", *DRAW, "--parameters", "0.85", "--save-as", "remote-code"]
    assert main(["compress", "model", *words, "-o", "out"]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert (here / "out/modeling_layerwise.py").is_file()


def test_plans_show_what_stays(here, same_process, capsys):
    assert main(["plan", "model", "--method", "magnitude-width", "--parameters", "0.8", "-o", "plan.yaml"]) == 0
    out = capsys.readouterr().out
    assert "what stays; all else stays whole" in out
    assert "model.layers.0.mlp" in out
    assert main(["evaluate", "model", *DRAW[:2]]) == 0


@pytest.mark.parametrize("stages", [1, 2])
def test_trained_in_turn_it_is_recorded_and_the_work_folder_goes(here, same_process, capsys, stages):
    pytest.importorskip("accelerate")
    words = ["--method", "adapt-pruner", "--set", "step=0.1", "--parameters", "0.7", "--recover-minutes", "0.02"]
    more = ["--stages", str(stages)] if stages > 1 else []
    assert main(["compress", "model", *words, *more, *DRAW, "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert ("stage 2" in out) == (stages == 2)
    assert "largest difference of logits 0 " in out
    record = json.loads((here / "out/layerwise.json").read_text())["result"]["recovery"]
    assert len(record.get("stages", [record])) == stages
    assert not (here / "out.work").exists()
    assert (
        main(
            ["recover", "out", "--teacher", "model", "--steps", "2", "--data", "text.txt", "--length", "32", "-o", "r"]
        )
        == 0
    )
    assert {n: v.shape for n, v in load_file("r/model.safetensors").items()} == {
        n: v.shape for n, v in load_file("out/model.safetensors").items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "flap", "--parameters", "0.8", *DRAW, "--solver", "wanda"], "--solver: not used"),
        (["--method", "flap", "--parameters", "0.01", *DRAW], "is the least"),
        (["--method", "flap", "--parameters", "0", *DRAW], "parameters=0"),
        (["--method", "wanda", "--parameters", "0.5"], '"wanda" is a solver, which computes the weights'),
        (["--method", "owl", "--parameters", "0.5", *DRAW], "method owl takes no --parameters"),
        (["--method", "flap", "--sparsity", "0.5", *DRAW], "method flap takes no --sparsity"),
        (["--method", "shortgpt", "--latency", "0.6", *DRAW], "method shortgpt takes no --latency 0.6"),
        (
            ["--method", "owl", "--macs", "0.6", *DRAW],
            "methods that take --macs: magnitude-width, random-width, llm-pruner",
        ),
        (["--method", "flap", "--latency", "0.6", "--set", "budget=macs", *DRAW], "--latency and --set budget="),
        (["--method", "flap", "--macs", "0.6", "--set", "parameters=0.5", *DRAW], "--macs and --set parameters="),
        (["--method", "flap", "--parameters", "0.8", "--stages", "3", *DRAW], "--stages: not used"),
        (["--sparsity", "0.5", "--recover-minutes", "3", *DRAW], "use layerwise recover"),
        (["--method", "magnitude-width", "--multiple-of", "8"], "--multiple-of: not used"),
        (["--method", "magnitude-width", "--save-as", "onnx"], "give auto or remote-code"),
        (["--sparsity", "0.5", "--uniform-width", *DRAW], "no heads or channels are cut"),
        (["--method", "magnitude-width", "--macs", "0.5", "--parameters", "0.5"], "Give one of them"),
        (["--method", "flap", "--recover-minutes", "1", "--stages", "3", *DRAW], "Adapt-Pruner's"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(here, same_process, capsys, words, said):
    assert main(["compress", "model", *words, "-o", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("layerwise:")]) == 1
    assert not (here / "out").exists()
