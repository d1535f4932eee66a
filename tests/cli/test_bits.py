"""`plan` with bits: the file, what is shown, what is refused; edited by hand and compared."""

import json

import pytest

import layerwise.solvers as solvers
from layerwise.cli import main
from layerwise.plan import Plan
from rounding import Rounding

LWQ = (
    "plan model --method lwq --levels 2,4 --set group=16 --set symmetric=false".split()
)  # the tiny model: 32 inputs, 48 of down


@pytest.fixture
def planned(here):
    assert main([*LWQ, "--bits", "4.3", "--set", "score=zd", "-o", "plan.yaml", "-q"]) == 0
    return here


def refused(capsys, args, *words):
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
    return err


def test_a_plan_of_bits(planned, capsys):
    plan = Plan.load(planned / "plan.yaml")
    assert {entry.quantize.bits for entry in plan.layers.values()} == {2, 4}
    assert plan.budget.bits == 4.3
    assert 3.8 < plan.budget.achieved_bits <= 4.3
    assert main([*LWQ, "--bits", "4.3", "--set", "score=zd"]) == 0
    out = capsys.readouterr().out
    assert f"lwq: {plan.budget.achieved_bits:.4f} bits per weight with scales and zeros" in out
    assert "become zero" not in out
    assert main([*LWQ, "--bits", "4.3", "--set", "score=zd", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["layers"] == plan.to_dict()["layers"]


def test_by_data_and_for_vllm(here, capsys):
    data = "--data text.txt --samples 2 --length 32".split()
    assert main([*LWQ, "--bits", "4.3", *data, "-q", "-o", "lim.yaml"]) == 0
    assert Plan.load(here / "lim.yaml").scores.keys() == {f"model.layers.{i}" for i in range(3)}
    tied = [
        "--set",
        "granularity=layer",
        "--set",
        "score=random",
        "--for",
        "vllm",
        "--seed",
        "5",
        "-q",
        "-o",
        "tied.yaml",
    ]
    assert main([*LWQ, "--bits", "4.1", *tied]) == 0
    plan = Plan.load(here / "tied.yaml")
    assert plan.method["target"] == "vllm"
    assert plan.method["seed"] == 5
    for block in range(3):
        heads = {plan.layers[f"model.layers.{block}.self_attn.{one}_proj"].quantize.bits for one in "qkv"}
        both = {plan.layers[f"model.layers.{block}.mlp.{one}_proj"].quantize.bits for one in ("gate", "up")}
        assert len(heads) == len(both) == 1


def test_by_measured_errors(here, monkeypatch):
    monkeypatch.setitem(solvers.SOLVERS, "rounding", Rounding)
    args = "plan model --method least-error --bits 4.1 --levels 2,3,4 --set solver=rounding --set group=16".split()
    assert (
        main([*args, *"--set granularity=layer --data text.txt --samples 2 --length 32 -q -o plan.yaml".split()]) == 0
    )
    assert Plan.load(here / "plan.yaml").budget.achieved_bits <= 4.1


def test_uniform_bits_are_whole(here, capsys):
    assert main("plan model --method uniform-bits --bits 3 --set group=16 -q -o plan.yaml".split()) == 0
    plan = Plan.load(here / "plan.yaml")
    assert {entry.quantize.bits for entry in plan.layers.values()} == {3}
    refused(capsys, "plan model --method uniform-bits --bits 3.5".split(), "bits=3.5: give a whole number")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*LWQ, "--bits", "2.5", "--set", "score=zd"], ["bits=2.5", "3.125 to 5.25 bits per weight"]),
        ([*LWQ, "--bits", "9", "--set", "score=zd"], ["bits=9", "3.125 to 5.25"]),
        ("plan model --method lwq --levels 2,40".split(), ["2 to 8"]),
        ("plan model --method lwq --levels 3,4 --for vllm".split(), ["vLLM runs 2, 4 and 8"]),
        ("plan model --method lwq --for tgi".split(), ['target="tgi"', "transformers, vllm"]),
        ("plan model --method lwq --set score=zd --set indivisible=error".split(), ["group=128", "does not divide"]),
        ("plan model --bits 3.25".split(), ["--bits 3.25: a mean of several levels", "least-error", "lwq"]),
        ("plan model --method erk --for vllm".split(), ["method erk takes no --for vllm", "least-error"]),
        ("plan model --method lwq --sparsity 0.5".split(), ["method lwq takes no --sparsity 0.5"]),
        ([*LWQ, "--for", "vllm", "--set", "target=transformers"], ["--for and --set target=", "twice"]),
        ([*LWQ, "--set", "score=zd", "--samples", "3"], ["--samples", "method lwq looks at weights alone"]),
        ([*LWQ, "--set", "score=zd", "--seed", "3"], ["--seed", "draws nothing"]),
        ("plan model --edit plan.yaml --bits 3".split(), ["--bits", "--edit"]),
        ("plan model --edit plan.yaml --levels 2,4 --for vllm".split(), ["--levels, --for", "--edit"]),
        ("plan model --edit plan.yaml --rebalance".split(), ["no budget.sparsity", "budget.bits are met by"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_what_cannot_be(planned, capsys, args, words):
    refused(capsys, args, *words)


def test_edited_by_hand_and_compared(planned, capsys):
    text = (planned / "plan.yaml").read_text()
    high = next(line for line in text.splitlines() if "bits: 4," in line)
    (planned / "lower.yaml").write_text(text.replace(high, high.replace("bits: 4", "bits: 2")))
    assert main("plan model --edit lower.yaml -o plan2.yaml".split()) == 0
    assert "bits per weight with scales and zeros" in capsys.readouterr().out
    before, after = (Plan.load(planned / name).budget.achieved_bits for name in ("plan.yaml", "plan2.yaml"))
    assert after < before
    assert main("diff plan.yaml plan2.yaml".split()) == 0
    assert "quantize.bits" in capsys.readouterr().out
    (planned / "higher.yaml").write_text(text.replace("bits: 2,", "bits: 8,"))
    refused(capsys, "plan model --edit higher.yaml".split(), "budget.bits 4.3", "Lower the bits of some")


@pytest.mark.parametrize(
    "words", ["--method lwq --set score=zd --bits 3 --set group=16", "--method erk", "--edit plan.yaml"]
)
def test_a_plan_is_drawn(here, capsys, words):
    assert main("plan model --method uniform --sparsity 0.5 -o plan.yaml -q".split()) == 0
    assert main(["plan", "model", *words.split(), "--plot", "plan.png"]) == 0
    assert "Drawn: plan.png" in capsys.readouterr().out
    assert (here / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "model", *words.split(), "--plot", "plan.png"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["plan", "model", *words.split(), "--plot", "plan.png", "--force", "-q"]) == 0


def test_a_plan_of_the_cache_alone_speaks_of_no_sparsity(here, capsys):
    (here / "cache.yaml").write_text(
        "layerwise: 1\nlayers:\n  model.layers.0.self_attn: {cache: {key_bits: 4, value_bits: 4}}\n"
    )
    assert main("plan model --edit cache.yaml --json -q".split()) == 0
    assert "achieved" not in json.loads(capsys.readouterr().out)["plan"].get("budget", {})
    assert main("plan model --edit cache.yaml --plot cache.png".split()) == 0
    assert "nothing is drawn" in capsys.readouterr().err
    assert not (here / "cache.png").exists()


def test_a_plan_of_the_cache_alone_needs_no_data(here, capsys, same_process):
    (here / "cache.yaml").write_text(
        "layerwise: 1\nlayers:\n  model.layers.0.self_attn: {cache: {key_bits: 4, value_bits: 4}}\n"
    )
    assert main("compress model --plan cache.yaml -o out".split()) == 0
    out, _ = capsys.readouterr()
    assert "pruned" not in out
    assert "4" in out
    assert main("plan model -o plan.txt".split()) == 2
    assert "ends in .yaml or .json" in capsys.readouterr().err
