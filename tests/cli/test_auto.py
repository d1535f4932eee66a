"""`--method auto` on the command line: what was tried is shown, the verdict is a note, the solver is the one that will be used."""

import json

import pytest

from layerwise.cli import main
from layerwise.plan import Plan

TEXT = "--data text.txt --samples 4 --length 16".split()
AUTO = "--method auto --sparsity 0.5 --set only=erk".split()


@pytest.mark.usefixtures("here")
def test_plan_shows_what_was_tried_and_says_why(capsys):
    assert main(["plan", "model", *AUTO, *TEXT, "-o", "plan.yaml"]) == 0
    shown = capsys.readouterr()
    assert "on unseen data" in shown.out
    assert "erk power=0.5" in shown.out
    assert shown.err.count("note:") == 1
    assert "on data the search did not see" in shown.err
    plan = Plan.load("plan.yaml")
    assert plan.method["name"] == "auto"
    assert plan.notes[0] in shown.err


def test_a_killed_search_goes_on(here, capsys, monkeypatch):
    from layerwise.methods import ERK

    plan = ERK.plan

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ERK, "plan", killed)
    assert main(["plan", "model", *AUTO, *TEXT, "-o", "plan.yaml"]) == 130
    record = here / "plan.yaml.search.json"
    assert next(one["name"] for one in json.loads(record.read_text())["tried"]) == "uniform"
    assert not (here / "plan.yaml").exists()
    monkeypatch.setattr(ERK, "plan", plan)
    assert main(["plan", "model", *AUTO, *TEXT, "-o", "plan.yaml", "--json"]) == 0
    tried = json.loads(capsys.readouterr().out)["tried"]
    assert [one["name"] for one in tried][-1] == "erk power=2"
    assert not record.exists()


@pytest.mark.usefixtures("here", "same_process")
def test_compress_searches_with_its_solver(capsys):
    more = ["--solver", "magnitude", "--minutes", "0.000001", "-o", "out", "--json"]
    assert main(["compress", "model", *AUTO, *TEXT, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["method"]["solver"] == "magnitude"
    assert found["plan"]["method"]["minutes"] == 0.000001
    assert {one["reason"] for one in found["tried"]} == {"", "no time was left"}


@pytest.mark.usefixtures("here")
def test_other_methods_take_no_minutes(capsys):
    assert main(["plan", "model", "--method", "erk", "--minutes", "3"]) == 2
    assert "takes no --minutes" in capsys.readouterr().err
