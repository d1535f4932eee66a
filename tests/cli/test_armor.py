"""ARMOR through `main`: the commands that a user types, what they say, and what is refused."""

import json

import pytest
import torch

import layerwise as lw
from layerwise.cli import main
from layerwise.io import armor_linears
from layerwise.io.verify import Verified
from layerwise.plan import Plan

DATA = "--data text.txt --samples 4 --length 32".split()
QUICK = ["--set", "block=8", "--set", "overhead=1.0", "--solver-set", "iterations=3"]


def text_of(capsys):
    return capsys.readouterr().out.replace("\n", " ")


def test_a_pattern_and_the_solver_are_enough(here, same_process, capsys):
    words = ["compress", "model", "--solver", "armor", "--pattern", "2:4", *DATA, *QUICK, "--output", "out"]
    assert main(words) == 0
    out = text_of(capsys)
    plan = Plan.load(here / "out" / "plan.yaml")
    bits = plan.budget.achieved_bits
    # the tiny model is float32: values and factors of 32 bits, positions of one
    assert f"21 layers to {2 * bits - 1:.3f} bits per weight with positions and factors" in out
    assert "In factors (ARMOR, cores 2:4): 21 layers" in out
    assert "pruned" not in out
    assert plan.method["name"] == plan.solver["name"] == "armor"
    assert {one.factorize.pattern for one in plan.layers.values()} == {"2:4"}
    model = lw.load("out")
    assert set(armor_linears(model)) == set(plan.layers)
    record = json.loads((here / "out" / "layerwise.json").read_text())
    assert record["factors"]["layers"] == dict.fromkeys(plan.layers, "2:4")
    assert record["result"]["bits"] == pytest.approx(2 * bits - 1)
    assert main("evaluate out --against model --data text.txt --length 32 --tokens 640 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] != found["dense_perplexity"]
    own = lw.evaluate(model, lw.held_out("text.txt", lw.load_tokenizer("out"), length=32, tokens=640)).perplexity
    assert found["perplexity"] == pytest.approx(own)
    assert main("inspect out".split()) == 2  # what is in factors is not compressed again
    assert "no layers are left to compress" in capsys.readouterr().err


def test_dense_is_a_stock_folder_of_the_same_numbers(here, same_process, capsys):
    words = ["compress", "model", "--method", "armor", *DATA, *QUICK]
    assert main([*words, "-o", "out", "-q"]) == 0
    capsys.readouterr()
    assert main([*words, "-o", "whole", "--dense", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["saved"]["factored"] is None
    whole, factored = lw.load("whole"), lw.load("out", dense=True)
    assert (here / "whole" / "model.safetensors").exists()
    for (name, one), other in zip(whole.named_parameters(), factored.parameters()):
        assert torch.equal(one, other), name


def test_a_plan_is_shown_edited_and_applied_streamed(here, same_process, capsys):
    assert main(["plan", "model", "--method", "armor", "--bits", "13", "-o", "plan.yaml"]) == 0
    out = text_of(capsys)
    plan = Plan.load(here / "plan.yaml")
    assert f"armor: {plan.budget.achieved_bits:.4f} bits per weight with factors, the cores alone 9." in out
    assert "smallest block" in out
    (here / "plan.yaml").write_text((here / "plan.yaml").read_text().replace("2:4", "1:4"))
    more = ["--solver-set", "iterations=2"]
    assert main(["compress", "model", "--plan", "plan.yaml", *DATA, *more, "-o", "whole", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"]["factored"]["patterns"] == ["1:4"]
    assert main(["compress", "model", "--plan", "plan.yaml", *DATA, *more, "-o", "streamed", "--stream", "-q"]) == 0
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(lw.load("streamed")(ids).logits, lw.load("whole")(ids).logits)


def test_nowag_prunes_like_any_solver(here, same_process, capsys):
    assert main(["compress", "model", "--solver", "nowag", "--pattern", "2:4", *DATA, "-o", "out"]) == 0
    assert "(50.0000%), 21 layers" in text_of(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--solver armor --sparsity 0.5", "method armor takes no --sparsity 0.5"),
        ("--solver armor --pattern row", 'Armor.pattern="row"'),
        ("--method owl --solver armor", 'solver "armor" cannot prune, only factorize'),
        ("--method armor --solver wanda", 'solver "wanda" cannot factorize, only prune'),
        ("--method armor --bits 2", "Armor.bits=2: cores of 2:4 with the smallest blocks take"),
        ("--solver armor --solver-set storage=int8", 'ARMOR.storage="int8"'),
        ("--solver wanda --dense", "--dense: not used, since only layers in factors are multiplied out"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(here, capsys, words, message):
    assert main(["compress", "model", *DATA, "-o", "out", *words.split()]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (here / "out").exists()


def test_the_check_in_a_fresh_process_is_made_by_layerwise(here, monkeypatch, capsys):
    from layerwise.io import verify

    asked = []
    monkeypatch.setattr(
        verify, "verify", lambda model, folder, loader, **more: asked.append(loader) or Verified("x", 1, (), None)
    )
    assert main(["compress", "model", "--solver", "armor", *DATA, *QUICK, "-o", "out", "-q"]) == 0
    assert (asked[0].library, asked[0].class_name) == ("layerwise", "load")
