"""How one weight is compressed: tensors, input statistics and a treatment in, a solved weight out."""

from collections.abc import Mapping
from typing import Any

from ..settings import build
from .armor import ARMOR
from .base import Solved, Solver, for_dtype, group_bits_of
from .codes import Codes
from .factors import Factors
from .gptq import GPTQ
from .hqq import HQQ
from .magnitude import Magnitude
from .nowag import NoWag
from .random import Random
from .round_to_nearest import RoundToNearest
from .sparsegpt import SparseGPT
from .wanda import Wanda

__all__ = [
    "ARMOR",
    "GPTQ",
    "HQQ",
    "SOLVERS",
    "Codes",
    "Factors",
    "Magnitude",
    "NoWag",
    "Random",
    "RoundToNearest",
    "Solved",
    "Solver",
    "SparseGPT",
    "Wanda",
    "for_dtype",
    "group_bits_of",
    "solver_from",
]

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "nowag": NoWag,
    "sparsegpt": SparseGPT,
    "armor": ARMOR,
    "round_to_nearest": RoundToNearest,
    "hqq": HQQ,
    "gptq": GPTQ,
}


def solver_from(settings: Mapping[str, Any]) -> Solver:
    """Build a solver from {"name": ..., **its settings}, as plans hold it.

    Raises ConfigError for an unknown name or setting, offering the nearest, for a value of the wrong type or outside its range.
    """
    given = dict(settings)
    return build("solver", SOLVERS, given.pop("name", None), given)
