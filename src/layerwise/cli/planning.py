"""Make a plan as a command asks for, with the model's facts and the solver written into it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import ModelChoice
from .screen import Screen

if TYPE_CHECKING:
    from torch import nn

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
) -> "Plan":
    """Scores, allocation, plan; checked against the model. Raises BudgetError, ScoreError, PlanError."""
    with screen.task(f"Planning with {name_of(method)}"):
        plan: Plan = method.plan(model, data, structure=structure)
    plan = with_facts(plan, choice, structure, solver)
    plan.check(structure.layers, blocks=[block.name for block in structure.blocks], fingerprint=structure.fingerprint)
    return plan


def with_facts(plan: "Plan", choice: ModelChoice, structure: "Structure", solver: "Solver | None" = None) -> "Plan":
    """The plan with the model it was made for, the sparsity it achieves and the solver."""
    from ..plan import ModelFacts

    facts = ModelFacts(
        name=choice.name if choice.name == "demo" else Path(choice.name).name,
        parameters=structure.parameters,
        fingerprint=structure.fingerprint,
    )
    updates: dict[str, Any] = {"model": facts}
    if solver is not None:
        updates["solver"] = {"name": solver.name, **asdict(solver)}  # type: ignore[call-overload]
    return plan.model_copy(update=updates).with_achieved(structure.layers)


def name_of(method: Any) -> str:
    """The word for this method in `layerwise methods`."""
    return str(getattr(method, "name", type(method).__name__.lower()))
