"""`main`: run the command and turn whatever happens into an exit code and one line per problem on standard error."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from ..errors import LayerwiseError, PlanError
from .app import app
from .screen import rank_from_environment

# typer carries its own copy of click since 0.21; both name the base of their usage errors alike
_UsageProblem: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_STOPPED = 130  # as shells count: 128 + SIGINT
_MOST = 12  # lines; a key that is misspelt in every layer has as many problems as the plan has layers
_PATIENCE = 3.0  # seconds in which the launcher ends the other ranks


def main(args: Sequence[str] | None = None) -> int:
    """Run `layerwise ARGS` (default: of this process) and return the exit code: 0 done, 1 failed, 2 bad request, 130 stopped."""
    if args is None:  # a process of our own; both are read when torch is imported, which is later
        # OpenMP threads that spin while they wait cost four times the time on a busy machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # large tensors in huge pages: without, a forward pass spends a tenth of its time on page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")  # libraries warn about things that are no concern of the user's
            logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            outcome = app(args=arguments, prog_name="layerwise", standalone_mode=False)
            if outcome == _STOPPED:  # typer turns an interrupt into this number
                raise KeyboardInterrupt
            return outcome if isinstance(outcome, int) else 0
        except typer.Exit as stop:
            return int(stop.exit_code)
        except BrokenPipeError:  # `layerwise ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            code, lines = explain(error)
            if code is None:
                raise
            _wait_for_the_launcher(error)
            if debug:
                traceback.print_exc()
            for line in lines if debug else _first(lines):
                print(f"layerwise: {line}", file=sys.stderr)
            return code


def explain(error: BaseException) -> tuple[int | None, list[str]]:
    """(exit code, lines for the user); no code for what must not be caught."""
    if isinstance(error, PlanError):
        return error.exit_code, [_one_line(problem) for problem in error.problems]
    if isinstance(error, LayerwiseError):
        return error.exit_code, [_one_line(" ".join([str(error), *getattr(error, "__notes__", [])]))]
    if isinstance(error, _UsageProblem):
        context = getattr(error, "ctx", None)
        where = f" See {context.command_path} --help." if context is not None else ""
        message = _one_line(str(error.format_message())).rstrip(".")
        return 2, [f"{message}.{where}"] if message else []  # without a command the help has been shown: nothing to add
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return _STOPPED, ["stopped."]
    if isinstance(error, Exception):
        what = _one_line(f"{type(error).__name__}: {error}")
        if len(what) > 400:
            what = f"{what[:400]}…"
        return 1, [f"unexpected {what}; run again with --debug for the traceback."]
    return None, []


def _first(lines: list[str]) -> list[str]:
    """As many as a screen shows at a glance, and how many there are beyond."""
    if len(lines) <= _MOST:
        return lines
    return [*lines[: _MOST - 1], f"{len(lines) - _MOST + 1} more problems; --debug shows all."]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wait_for_the_launcher(error: BaseException) -> None:
    """Under torchrun one line is enough: rank 0 speaks first, another rank only if the launcher has not ended it meanwhile.

    A rank whose peer has gone gets an unexpected error of the connection; the peer's own words are the ones to read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    ours = isinstance(error, LayerwiseError)
    waits = (0 if ours else 2) + (0 if rank_from_environment() == 0 else 1)
    time.sleep(waits * _PATIENCE)
