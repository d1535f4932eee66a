"""How one weight is compressed: tensors, input statistics and a treatment in, a solved weight out."""

from collections.abc import Mapping
from typing import Any

from ..settings import build
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

    Raises ConfigError for an unknown name or setting, offering the nearest, for a value of the wrong type or outside its range.
    """
    given = dict(settings)
    return build("solver", SOLVERS, given.pop("name", None), given)
