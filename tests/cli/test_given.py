"""No option is ignored in silence: where nothing would read it, it is refused in one line, before any work. What `auto` means."""

import re

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from layerwise.cli import main
from layerwise.cli.settings import device_of
from layerwise.plan import Plan, Prune

DATA = "--data text.txt --samples 4 --length 32 --batch 2".split()
SHARING = "--include * --exclude *.0.* --method erk --sparsity 0.5 --pattern 2:4 --set spread=1".split()
SHARING += "--min-sparsity 0.1 --max-sparsity 0.9 --bits 3 --levels 2,4".split()
PAIRS = [SHARING[i : i + 2] for i in range(0, len(SHARING), 2)]
FREE = "compress model -o out --method erk --solver magnitude".split()


@pytest.fixture
def planned(here):
    Plan(layers={"model.layers.0.mlp.up_proj": Prune(sparsity=0.5)}).save(here / "plan.yaml")
    return here


def refused(here, capsys, args, *words):
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_what_makes_a_plan_does_not_go_with_one(planned, capsys, pair):
    refused(planned, capsys, ["compress", "model", "-o", "out", "--plan", "plan.yaml", *pair], pair[0], "(--plan)")
    refused(planned, capsys, ["plan", "model", "--edit", "plan.yaml", *pair], pair[0], "--edit")


@pytest.mark.parametrize("pair", [DATA[i : i + 2] for i in range(0, 8, 2)], ids=lambda pair: pair[0])
def test_data_that_nobody_looks_at(planned, capsys, pair):
    refused(planned, capsys, [*FREE, *pair], pair[0], "method erk and solver magnitude look at weights alone")
    with_plan = ["compress", "model", "-o", "out", "--plan", "plan.yaml", "--solver", "random", *pair]
    refused(planned, capsys, with_plan, pair[0], "solver random looks at weights alone")
    refused(planned, capsys, ["plan", "model", "--method", "erk", *pair], pair[0], "method erk looks at weights alone")
    refused(planned, capsys, ["plan", "model", "--edit", "plan.yaml", *pair], pair[0], "--edit")
    refused(planned, capsys, ["inspect", "model", *pair], pair[0], "without --score")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*FREE, "--propagate", "dense"], ["--propagate", "magnitude"]),
        ([*FREE, "--spill", "scratch"], ["--spill", "magnitude"]),
        (["compress", "model", "-o", "out", "--stream", "--remote-code"], ["--remote-code", "--stream"]),
        ("plan model --edit plan.yaml --seed 1".split(), ["--seed", "--edit"]),
        ("plan model --edit plan.yaml --keep *.0.*".split(), ["--keep", "without --rebalance"]),
        ("plan model --keep *.0.*".split(), ["--keep", "without --edit"]),
        ("plan model --rebalance".split(), ["--rebalance", "without --edit"]),
        ("plan model --force".split(), ["--force", "without --output"]),
        ("inspect model --seed 1".split(), ["--seed", "without --score"]),
        ("inspect model --force".split(), ["--force", "without --plot"]),
        ("plan model --method erk --seed 7".split(), ["--seed", "draws nothing"]),
        ("compress model --method erk --solver magnitude --seed 7 -o out".split(), ["--seed", "draw nothing"]),
        ("compare model --data text.txt --force".split(), ["--force", "without --output"]),
        ("compare model --data text.txt --solver magnitude --propagate dense".split(), ["--propagate"]),
        ("compare model --data text.txt --solver magnitude --methods erk --samples 4".split(), ["--samples"]),
        ("compare model --data text.txt --held-out text.txt --solver magnitude --methods erk".split(), ["--data"]),
        ("plan model --sparsity 0.5 --set sparsity=0.6".split(), ["--sparsity", "--set sparsity=", "twice"]),
        ("plan model --method random --set spread=0.1 --set spread=0.2".split(), ["--set spread=", "twice"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_an_option_without_effect(planned, capsys, command, words):
    refused(planned, capsys, command, *words)


def test_several_are_named_at_once(here, capsys):
    refused(
        here, capsys, [*FREE, "--samples", "4", "--length", "32"], "--samples, --length: not used", "Leave them out."
    )


def test_defaults_are_no_request(planned, same_process, capsys):
    assert main([*FREE, "-q"]) == 0
    assert main("plan model --edit plan.yaml --include *".split()) == 2  # said though it changes nothing
    assert main("plan model --edit plan.yaml -q".split()) == 0


def test_a_plan_of_other_layers_than_the_default_can_be_edited(here, capsys):
    assert main("plan model --include *embed_tokens* --sparsity 0.5 -o plan.yaml -q".split()) == 0
    assert main("plan model --edit plan.yaml --rebalance -o plan2.yaml".split()) == 0
    assert Plan.load(here / "plan2.yaml").layers == Plan.load(here / "plan.yaml").layers
    assert "50.0000% of 1 layers" in capsys.readouterr().out


@pytest.fixture
def classifier(here):
    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained("vit")
    return here


@pytest.mark.parametrize("option", ["--length 8", "--tokens 8", "--convention wanda", "--latency"])
def test_a_classifier_is_judged_by_its_accuracy_alone(classifier, capsys, option):
    refused(classifier, capsys, ["evaluate", "vit", "--data", "digits", *option.split()], option.split()[0], "accuracy")


@pytest.mark.parametrize("command", ["compress vit -o out", "inspect vit --score block-influence"])
def test_images_have_no_length(classifier, capsys, command):
    refused(classifier, capsys, [*command.split(), "--data", "digits", "--length", "8"], "--length", "images")


@pytest.mark.parametrize("command", ["compare vit --data digits", "demo --model vit --data digits -o out"])
def test_a_comparison_by_perplexity_needs_a_language_model(classifier, capsys, command):
    refused(classifier, capsys, command.split(), "vit", "language model")


def test_the_names_of_options_are_those_of_the_help(capsys):
    """`refuse` is told the names of parameters: one that no command has would refuse nothing."""
    from layerwise.cli import given

    assert main(["plan", "--help"]) == 0
    shown = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for name in (*given.SHARING, *given.CALIBRATION):
        assert f"--{name.strip('_').replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_is_the_first_device_there_is(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of("auto") == torch.device(chosen)
