"""`layerwise methods`: what there is, one line each."""

import sys
from dataclasses import fields

from .. import options
from ..screen import Screen, table


def methods(json: options.Json = False, debug: options.Debug = False) -> None:
    """List the methods and solvers, one line each, with their settings.

    [dim]Example:[/]  layerwise methods
    """
    from ...methods import METHODS
    from ...solvers import SOLVERS

    screen = Screen(json=json)
    rules = table(
        "method", "needs", "what it does", "settings (--set)", title="Methods: how the budget is shared", left=4
    )
    for name, method in METHODS.items():
        rules.add_row(f"[bold]{name}[/]", "data" if method.needs_data else "–", method.summary, _settings(method))
    solvers = table(
        "solver",
        "needs",
        "what it does",
        "settings (--solver-set)",
        title="\nSolvers: what computes the new weights",
        left=4,
    )
    for name, solver in SOLVERS.items():
        solvers.add_row(
            f"[bold]{name}[/]", "–" if solver.needs == "none" else "data", _first_line(solver), _settings(solver)
        )
    screen.show(rules, solvers)
    screen.show_json(
        {
            "methods": {
                name: {"summary": method.summary, "needs_data": method.needs_data, "settings": _defaults(method)}
                for name, method in METHODS.items()
            },
            "solvers": {
                name: {"summary": _first_line(solver), "needs": solver.needs, "settings": _defaults(solver)}
                for name, solver in SOLVERS.items()
            },
        }
    )


def _defaults(kind: type) -> dict[str, object]:
    return {one.name: one.default for one in fields(kind)}


def _settings(kind: type) -> str:
    return ", ".join(f"{name}={value}" for name, value in _defaults(kind).items()) or "–"


def _first_line(kind: type) -> str:
    """The first sentence of the module that defines it, without name and source."""
    line = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
    return line.partition(": ")[2].partition(" (")[0].rstrip(".")
