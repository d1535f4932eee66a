"""Make a plan as a command asks for, with the model's facts and the solver written into it."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import ModelChoice
from .running import show_notes
from .screen import Screen, table

if TYPE_CHECKING:
    from torch import nn

    from ..engine import Settings
    from ..methods import KVSearch, Search
    from ..plan import Plan
    from ..solvers import Solver
    from ..structure import Structure
    from ..tasks import Batches


def make_plan(
    method: Any,
    choice: ModelChoice,
    model: "nn.Module",
    structure: "Structure",
    data: "Batches | None",
    screen: Screen,
    solver: "Solver | None" = None,
    settings: "Settings | None" = None,
    record: Path | None = None,
    storage: str | None = None,
) -> "tuple[Plan, Search | KVSearch | None]":
    """Scores, allocation, plan; checked against the model, its notes said, and what was tried where that was a search.

    solver, settings: of the run that will follow. record: where a search writes what it has tried, so that it goes on after a kill;
    whoever saves what came of it removes it. storage: of a search for bits, instead. Raises BudgetError, ScoreError, PlanError.
    """
    from ..methods import Auto, KVTuner
    from ..scores import alphas_kept, watched

    search: Search | KVSearch | None = None
    with screen.task(f"Planning with {name_of(method)}") as step, alphas_kept(alphas_folder()):
        if isinstance(method, Auto):
            search = method.search(
                model, data, structure=structure, solver=solver, settings=settings, record=record, progress=step
            )
            plan = search.plan
        elif isinstance(method, KVTuner):
            with watched(step):
                search = method.search(model, data, structure=structure, storage=storage or record)
            plan = search.plan
        else:
            with watched(step):
                plan = method.plan(model, data, structure=structure)
    if isinstance(method, Auto) and search is not None:
        _show_search(search, screen)
    show_notes(plan.notes, screen)
    plan = with_facts(plan, choice, structure, solver)
    plan.check(
        structure.layers,
        blocks=[block.name for block in structure.blocks],
        attentions=structure.attentions,
        fingerprint=structure.fingerprint,
    )
    return plan, search


def record_of(output: Path) -> Path:
    """Where a search for this output writes what it has tried."""
    return output.with_name(f"{output.name}.search.json")


def tried_of(search: "Search | KVSearch | None") -> dict[str, Any]:
    """What a search tried, as a part of a command's JSON."""
    return {} if search is None else {"tried": [asdict(one) for one in search.tried]}


def _show_search(search: Any, screen: Screen) -> None:
    """Nearest to the dense model first, then what could not be tried."""
    rows = table("plan", "divergence", "on unseen data", "seconds", "")
    known = sorted((one for one in search.tried if one.divergence is not None), key=lambda one: one.divergence or 0.0)
    for one in [*known, *(one for one in search.tried if one.divergence is None)]:
        figures = ["" if value is None else f"{value:.4f}" for value in (one.divergence, one.unseen)]
        rows.add_row(one.name, *figures, f"{one.seconds:.1f}" if one.seconds else "", one.reason)
    screen.show(rows, "")


def with_facts(plan: "Plan", choice: ModelChoice, structure: "Structure", solver: "Solver | None" = None) -> "Plan":
    """The plan with the model it was made for, the sparsity it achieves and the solver."""
    from ..plan import ModelFacts

    facts = ModelFacts(
        name=choice.name if choice.name == "demo" else Path(choice.name).name,
        parameters=structure.parameters,
        fingerprint=structure.fingerprint,
    )
    plan = plan.model_copy(update={"model": facts})
    plan = plan if solver is None else with_solver(plan, solver)
    return plan.with_achieved(structure.layers)


def with_solver(plan: "Plan", solver: "Solver") -> "Plan":
    """The plan with this solver and its settings in the place of its own, its bits counted as this one stores them."""
    from ..solvers import group_bits_of

    signed = plan.model_copy(update={"solver": {"name": solver.name, **asdict(solver)}})  # type: ignore[call-overload]
    return signed.stored_with(group_bits_of(solver))


def alphas_folder() -> Path | None:
    """Where exponents of weights are kept from one command to the next: LAYERWISE_CACHE/alphas, or a folder of the user's cache.

    None if LAYERWISE_CACHE is "off". Their names say what they depend on: weights that changed, another torch or device are computed anew.
    """
    chosen = os.environ.get("LAYERWISE_CACHE", "")
    if chosen.lower() == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"
    return (Path(chosen) if chosen else home) / "alphas"


def name_of(method: Any) -> str:
    """The word for this method in `layerwise methods`."""
    return str(getattr(method, "name", type(method).__name__.lower()))
