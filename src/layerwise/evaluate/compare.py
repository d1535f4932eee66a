"""Methods side by side at one budget: every cell is one model pruned from the same dense weights and measured on the same text.

The walk, the table and the verdict; whoever shows them imports from here. One model in memory is pruned for cell after cell, its weights
put back from the dense one in between.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..engine import Event, Settings
from ..engine import compress as prune
from ..errors import LayerwiseError
from ..plan import Plan
from ..solvers import Solver
from ..structure import Structure
from ..tasks import Batches
from .evaluation import Evaluation, evaluate
from .memory import peak_memory

CONTROLS = ("uniform", "random")  # every table has them: a method that does not beat both has shown nothing


class Method(Protocol):
    """What a comparison asks of a method."""

    needs_data: ClassVar[bool]

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """Decide; the model stays as it is."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One cell to be made. `method` is already set up for this sparsity and seed."""

    name: str
    method: Method
    sparsity: float
    seed: int
    solver: Solver


@dataclass(frozen=True)
class Cell:
    """One pruned model. achieved: zeros over the weights that the plan shares its budget over, counted in the weights. seconds: planning
    and pruning, measuring left out. peak: bytes of resident memory meanwhile, of the whole process."""

    recipe: Recipe
    plan: Plan
    achieved: float
    evaluation: Evaluation
    seconds: float
    peak: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the protocol is the table's, not the cell's."""
        return {
            "method": self.recipe.name,
            "solver": self.recipe.solver.name,
            "sparsity": self.recipe.sparsity,
            "seed": self.recipe.seed,
            "achieved": self.achieved,
            "perplexity": self.evaluation.perplexity,
            "kl": self.evaluation.kl,
            "top1": self.evaluation.top1,
            "seconds": self.seconds,
            "peak_bytes": self.peak,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Working:
    """Told before each step of each cell. done: half cells (pruned, measured) out of `total`."""

    recipe: Recipe
    done: int
    total: int
    stage: str  # planning, pruning, measuring


def cells(
    model: nn.Module,
    dense: nn.Module,
    recipes: Iterable[Recipe],
    *,
    calibration: Callable[[int], Batches | None],
    held_out: Batches,
    structure: Structure,
    settings: Settings | None = None,
    progress: Callable[[Working], None] | None = None,
    walk_progress: Callable[[Event], None] | None = None,
    failed: Callable[[Recipe, Exception], None] | None = None,
) -> Iterator[Cell]:
    """Make and measure cell after cell; `model` equals `dense` again after each, also if the caller stops.

    calibration: seed -> the windows drawn with it. A plan is made once for all
    solvers that its method is set up alike for; its time counts for each. failed: told of a cell that could not be made (an error
    of ours, or torch's for lack of memory), and the others go on; without it such an error ends the comparison.
    Errors as of the methods, `compress` and `evaluate`.
    """
    recipes, settings = list(recipes), settings or Settings()
    plans: dict[tuple[str, int, str], tuple[Plan, float]] = {}
    for number, recipe in enumerate(recipes):
        say = _teller(progress, recipe, number, len(recipes))
        data = calibration(recipe.seed)
        try:
            try:
                with peak_memory() as peak:
                    plan, planning = _planned(recipe, plans, model, data, structure, say)
                    say("pruning")
                    started = time.perf_counter()
                    result = prune(
                        model, plan, solver=recipe.solver, data=data, progress=walk_progress,
                        settings=Settings(settings.propagate, settings.device, None, recipe.seed),
                    )  # fmt: skip
                    seconds = planning + time.perf_counter() - started
                say("measuring")
                found = evaluate(model, held_out, against=dense, device=settings.device)
            except (LayerwiseError, RuntimeError, MemoryError) as error:  # torch's lack of memory is a RuntimeError
                if failed is None:
                    raise
                failed(recipe, error)
                continue
            yield Cell(recipe, plan, result.sparsity, found, seconds, peak.rss, (*plan.notes, *result.notes))
        finally:
            restore(model, dense, structure)


def _planned(
    recipe: Recipe,
    plans: dict[tuple[str, int, str], tuple[Plan, float]],
    model: nn.Module,
    data: Batches | None,
    structure: Structure,
    say: Callable[[str], None],
) -> tuple[Plan, float]:
    """The recipe's plan and the seconds that it took; made once."""
    key = recipe.name, recipe.seed, repr(recipe.method)  # a method may be set up for its solver
    if key not in plans:
        say("planning")
        started = time.perf_counter()
        plans[key] = recipe.method.plan(model, data, structure=structure), time.perf_counter() - started
    return plans[key]


def restore(model: nn.Module, dense: nn.Module, structure: Structure) -> None:
    """Put the dense model's weights back into every layer of `structure`."""
    with torch.no_grad():
        for layer in structure.layers:
            model.get_parameter(layer.parameter).copy_(dense.get_parameter(layer.parameter))


@dataclass(frozen=True)
class Row:
    """Cells of one method, solver and budget over its seeds: mean and standard deviation (0.0 for one seed)."""

    method: str
    solver: str
    sparsity: float
    seeds: tuple[int, ...]
    achieved: float
    perplexity: float
    perplexity_deviation: float
    kl: float
    kl_deviation: float
    top1: float
    top1_deviation: float
    seconds: float
    peak: int


def rows(done: Sequence[Cell]) -> list[Row]:
    """One row per method, solver and budget, in the order in which they first appear."""
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in done:
        groups.setdefault((cell.recipe.name, cell.recipe.solver.name, cell.recipe.sparsity), []).append(cell)
    return [_row(*key, members) for key, members in groups.items()]


def best(of: Sequence[Row]) -> Row:
    """The row of lowest mean perplexity; the first of equals."""
    return min(of, key=lambda row: row.perplexity)


def verdict(of: Sequence[Row]) -> str:
    """One sentence on rows of one solver and budget: who is best, by how much, and whether the seeds can tell."""
    winner = best(of)
    uniform = next((row for row in of if row.method == "uniform"), None)
    where = f"{winner.sparsity:.0%} with {winner.solver}"
    if uniform is None:
        return f"{where}: {winner.method} is best, with no uniform to hold it against."
    if winner is uniform:
        others = [row for row in of if row.method not in CONTROLS]
        return (
            f"{where}: uniform is best; {_names(others)} did not beat it." if others else f"{where}: uniform is best."
        )
    gain = uniform.perplexity - winner.perplexity
    text = f"{where}: {winner.method} is best, {winner.perplexity:.3f} beside uniform's {uniform.perplexity:.3f}"
    if len(winner.seeds) == 1:
        return f"{text}; one seed, so differences may be chance."
    spread = math.hypot(winner.perplexity_deviation, uniform.perplexity_deviation)
    clear = "more" if gain > 2 * spread else "not more"
    return f"{text}; {clear} than twice the deviation over seeds ({spread:.3f})."


def _names(of: Sequence[Row]) -> str:
    names = [row.method for row in of]
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _row(method: str, solver: str, sparsity: float, members: Sequence[Cell]) -> Row:
    perplexity = [cell.evaluation.perplexity for cell in members]
    kl = [cell.evaluation.kl or 0.0 for cell in members]
    top1 = [cell.evaluation.top1 or 0.0 for cell in members]
    return Row(
        method, solver, sparsity,
        seeds=tuple(cell.recipe.seed for cell in members),
        achieved=statistics.fmean(cell.achieved for cell in members),
        perplexity=statistics.fmean(perplexity), perplexity_deviation=_deviation(perplexity),
        kl=statistics.fmean(kl), kl_deviation=_deviation(kl),
        top1=statistics.fmean(top1), top1_deviation=_deviation(top1),
        seconds=statistics.fmean(cell.seconds for cell in members),
        peak=max(cell.peak for cell in members),
    )  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0.0 for one value, infinite if a value is."""
    if not all(math.isfinite(value) for value in values):
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _teller(
    progress: Callable[[Working], None] | None, recipe: Recipe, number: int, total: int
) -> Callable[[str], None]:
    def say(stage: str) -> None:
        if progress is not None:
            progress(Working(recipe, 2 * number + (stage == "measuring"), 2 * total, stage))

    return say
