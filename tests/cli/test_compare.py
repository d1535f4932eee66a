"""`layerwise compare`: what is measured is shown though a cell fails or someone stops it; settings go to the methods that have them."""

import json

import pytest

from layerwise.cli import main
from layerwise.methods import ERK, OWL

TEXT = "--data text.txt --held-out text.txt --tokens 64 --samples 4 --length 16".split()
COMPARE = ["compare", "model", *TEXT]

pytestmark = pytest.mark.usefixtures("here")


def test_a_method_that_cannot_meet_one_budget_leaves_the_others_their_rows(here, capsys, monkeypatch):
    plan = ERK.plan

    def picky(self, *args, **kwargs):
        if self.sparsity > 0.6:
            raise MemoryError("too large")
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(ERK, "plan", picky)
    words = [*COMPARE, "--methods", "erk", "--sparsity", "0.5,0.7", "-o", "table.html"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "erk, 70%, wanda, seed 0: not made: too large" in out
    assert "50% with wanda:" in out
    page = (here / "table.html").read_text()
    assert "not made: too large" in page
    assert "uniform, 50%" in page  # a picture for each budget
    assert "uniform, 70%" in page
    assert main([*words[:-2], "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["method"], one["sparsity"]) for one in found["cells"]] == [
        ("uniform", 0.5), ("random", 0.5), ("erk", 0.5), ("uniform", 0.7), ("random", 0.7),
    ]  # fmt: skip
    assert found["failed"] == ["erk, 70%, wanda, seed 0: not made: too large"]


def test_who_stops_it_sees_what_was_measured(capsys, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ERK, "plan", stop)
    assert main([*COMPARE, "--methods", "erk"]) == 130
    assert "random" in capsys.readouterr().out


def test_nothing_measured_is_the_error_itself(capsys):
    assert main([*COMPARE, "--methods", "erk", "--sparsity", "0.5", "--set", "spraed=1"]) == 2
    assert "spraed" in capsys.readouterr().err


def test_a_setting_goes_to_the_methods_that_have_it(capsys, monkeypatch):
    built = []
    for kind in (ERK, OWL):
        plan = kind.plan

        def seen(self, *args, _plan=plan, **kwargs):
            built.append(self)
            return _plan(self, *args, **kwargs)

        monkeypatch.setattr(kind, "plan", seen)
    assert main([*COMPARE, "--methods", "erk,owl", "--set", "spread=0.1", "--set", "power=0.5"]) == 0
    assert next(one for one in built if isinstance(one, ERK)).power == 0.5
    assert next(one for one in built if isinstance(one, OWL)).spread == 0.1
