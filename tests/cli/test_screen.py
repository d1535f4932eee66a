"""What goes where: results on standard output, remarks on standard error, nothing from the other ranks."""

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout

import pytest
import typer

from layerwise.cli import guard, screen
from layerwise.cli.screen import Screen
from layerwise.errors import PlanError, SolveError


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(screen.time, "perf_counter", lambda: now[0])
    return now


def test_a_short_task_says_nothing(clock, capsys):
    with Screen().task("Loading") as step:
        clock[0] = 1.9
        step(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_long_task_says_a_line_now_and_then(clock, capsys):
    with Screen().task("Pruning") as step:
        for done in range(1, 26):
            clock[0] = done  # one block a second
            step(done, 25, f"block {done}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Pruning: 2 of 25 (block 2), about 23 s left",
        "Pruning: 12 of 25 (block 12), about 13 s left",
        "Pruning: 22 of 25 (block 22), about 3 s left",
    ]


@pytest.mark.parametrize("quiet", [True, False])
def test_other_ranks_and_quiet_say_nothing(clock, capsys, monkeypatch, quiet):
    if not quiet:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
    one = Screen(quiet=quiet)
    with one.task("Pruning") as step:
        clock[0] = 60
        step(1, 2)
    one.say("a remark")
    assert capsys.readouterr() == ("", "")
    one.show("a result")
    assert capsys.readouterr().out == ("a result\n" if quiet else "")


def test_lines_go_on_while_a_library_is_kept_quiet(clock, capsys):
    shown = Screen()
    with redirect_stderr(io.StringIO()) as kept, redirect_stdout(kept):
        shown.say("half way")
        shown.show("a result")
    assert kept.getvalue() == ""
    assert capsys.readouterr() == ("a result\n", "half way\n")


def test_json_has_no_infinities(capsys):
    one = Screen(json=True)
    one.show("for people")
    one.show_json({"perplexity": math.inf, "kl": [math.nan, 1.5], 3: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "kl": [None, 1.5], "3": [True, None]}


def test_names_with_brackets_stay_what_they_are(capsys):
    Screen().say("model[red] [bold]")
    assert capsys.readouterr().err == "model[red] [bold]\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (PlanError(["one", "two\nlines"]), 2, ["one", "two lines"]),
        (SolveError("layer x"), 1, ["layer x"]),
        (KeyboardInterrupt(), 130, ["stopped."]),
        (typer.BadParameter("no"), 2, ["Invalid value: no."]),
        (KeyError("k"), 1, ["unexpected KeyError: 'k'; run again with --debug for the traceback."]),
        (SystemExit(3), None, []),
    ],
)
def test_every_error_has_its_code_and_lines(error, code, lines):
    assert guard.explain(error) == (code, lines)


def test_a_note_of_the_engine_is_part_of_the_line():
    error = SolveError("not finite.")
    error.__notes__ = ['layer "x"']
    assert guard.explain(error) == (1, ['not finite. layer "x"'])


def test_of_several_ranks_the_first_speaks_at_once(monkeypatch):
    waited = []
    monkeypatch.setattr(guard.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, error in (("0", SolveError("a")), ("1", SolveError("a")), ("0", RuntimeError("peer gone"))):
        monkeypatch.setenv("RANK", rank)
        guard._wait_for_the_launcher(error)
    assert waited == [0.0, 3.0, 6.0]
