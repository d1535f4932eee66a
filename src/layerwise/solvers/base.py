"""What every solver offers. A solver knows tensors and treatments: no module, no config, no layer name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..passes.statistics import InputStatistics, Need
from ..plan import Factorize, GroupBits, Prune, Quantize, Treatments
from ..treatments import USUAL
from .codes import Codes
from .factors import Factors

Treated = Treatments | Prune | Quantize | Factorize
"""What a matrix gets; a treatment by itself will do, as in `Plan.layers`."""


@dataclass
class Solved:
    """The outcome for one matrix.

    weight: (rows, columns) float32, zeros where pruned. keep: bool, True = kept.
    error: sum of squared changes of the outputs over the calibration tokens, ||(W - W') X||^2, or None where unknown.
    notes: what the user should know (a fallback, a raised damping), one sentence each.
    codes: of a quantized matrix; `codes.weight()` is the weight to the bit. None where it was only pruned.
    factors: of a factorized matrix; `factors.weight()` is the weight, up to how a device sums. Its `keep` is all True.
    """

    weight: Tensor
    keep: Tensor
    error: float | None = None
    notes: tuple[str, ...] = ()
    codes: Codes | None = None
    factors: Factors | None = None


class Solver(Protocol):
    """A frozen dataclass of plain settings; `dataclasses.asdict` of it is written into plans and results.

    One that quantizes has `group_bits: GroupBits`, what it stores of each group, unless that is a scale of 16 bits and a whole zero.
    """

    name: ClassVar[str]
    needs: ClassVar[Need]
    treats: ClassVar[frozenset[str]]  # what it can do to a matrix: "prune", "quantize", "factorize"
    every_pattern: ClassVar[bool]  # False: unstructured and n:m alone

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """Solve matrices that share one input, each (rows_i, columns) float32, each with its own treatment.

        `inputs` is None when `needs` is "none". Work that depends on the input alone is done once for all.
        """
        ...


PRUNES: frozenset[str] = frozenset({"prune"})
QUANTIZES: frozenset[str] = frozenset({"quantize"})
MOST_MASKS = 1000  # of a group of a core: 2:4 has 6, 4:8 has 70, 6:12 has 924
FACTORIZES: frozenset[str] = frozenset({"factorize"})


def refusal(solver: Solver, treated: Treated) -> str | None:
    """Why this solver cannot do that to a matrix, or None if it can."""
    treatments = full(treated)
    for field in sorted(treatments.model_fields_set - solver.treats):
        if getattr(treatments, field) is not None:
            return f'solver "{solver.name}" cannot {field}, only {" and ".join(sorted(solver.treats))}'
    if (factorize := treatments.factorize) and (masks := math.comb(*factorize.nm[::-1])) > MOST_MASKS:
        return f"a core of {factorize.pattern} has {masks} masks for each group, and all are tried: take one of {MOST_MASKS} at most"
    prune, quantize = treatments.prune, treatments.quantize
    if prune and not solver.every_pattern and prune.pattern != "unstructured" and not prune.nm:
        return (
            f'solver "{solver.name}" prunes unstructured and n:m alone, not in the pattern "{prune.pattern}";'
            ' "magnitude", "wanda", "sparsegpt", "nowag" and "random" do'
        )
    if quantize and not 2 <= quantize.bits <= 8:
        return f"{quantize.bits} bits: solvers quantize to 2 to 8. A layer left out of the plan keeps its bits"
    if quantize and quantize.symmetric and not getattr(solver, "every_grid", True):
        return f'solver "{solver.name}" moves the zero, which a symmetric grid fixes: take symmetric: false'
    return None


def group_bits_of(solver: Solver) -> GroupBits:
    """What this solver stores of each group of a layer that it quantizes."""
    stored: GroupBits = getattr(solver, "group_bits", USUAL)
    return stored


def for_dtype(solver: Solver, dtype: torch.dtype) -> Solver:
    """The solver with what depends on the dtype decided. `scales="auto"`: a packed checkpoint of this dtype is loaded with its scales in
    it, float16 is in float32. `storage="auto"`: that of the weight; float64 is stored in float32."""
    if getattr(solver, "storage", None) == "auto":
        word = str(dtype).removeprefix("torch.")
        return replace(solver, storage="float32" if dtype == torch.float64 else word)  # type: ignore[type-var]
    if getattr(solver, "scales", None) != "auto":
        return solver
    return replace(solver, scales="bfloat16" if dtype == torch.bfloat16 else "float16")  # type: ignore[type-var]


def full(treated: Treated) -> Treatments:
    """The treatments of one matrix, from a bare one too."""
    if isinstance(treated, Prune):
        return Treatments(prune=treated)
    if isinstance(treated, Factorize):
        return Treatments(factorize=treated)
    return Treatments(quantize=treated) if isinstance(treated, Quantize) else treated


def prunes_of(solver: Solver, treatments: Sequence[Treated]) -> list[Prune]:
    """What a solver that only prunes does to each matrix. Raises ConfigError for what it cannot do."""
    checked(solver, treatments)
    return [prune for one in treatments if (prune := full(one).prune)]


def checked(solver: Solver, treatments: Sequence[Treated]) -> list[Treatments]:
    """All in full. Raises ConfigError for the first that this solver cannot do."""
    for one in treatments:
        if why := refusal(solver, one):
            raise ConfigError(f"{why}.")
    return [full(one) for one in treatments]
