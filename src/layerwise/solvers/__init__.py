"""How one weight is compressed: tensors, input statistics and a treatment in, a solved weight out."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .base import Solved, Solver
from .magnitude import Magnitude
from .random import Random
from .sparsegpt import SparseGPT
from .wanda import Wanda

__all__ = ["SOLVERS", "Magnitude", "Random", "Solved", "Solver", "SparseGPT", "Wanda", "solver_from"]

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}


def solver_from(settings: Mapping[str, Any]) -> Solver:
    """Build a solver from {"name": ..., **its settings}, as plans hold it.

    Raises ConfigError for an unknown name or setting, offering the nearest, and for a value of the wrong type.
    """
    given = dict(settings)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in SOLVERS:
        raise ConfigError(
            f'unknown solver "{name}".{_nearest(str(name), list(SOLVERS))} Solvers: {", ".join(SOLVERS)}.'
        )
    chosen: Any = SOLVERS[name]
    fields = {field.name: field for field in dataclasses.fields(chosen)}
    for key, value in given.items():
        if key not in fields:
            known = f"It has {', '.join(fields)}." if fields else "It has none."
            raise ConfigError(f'solver {name} has no setting "{key}".{_nearest(key, list(fields))} {known}')
        given[key] = _typed(name, key, value, type(fields[key].default))
    solver: Solver = chosen(**given)
    return solver


def _typed(name: str, key: str, value: Any, wanted: type) -> Any:
    """The value in the type of the setting's default. An int will do for a float; a bool for no number."""
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]
        raise ConfigError(f"solver {name}: {key}={value!r}: give {kind}.")
    return value


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
