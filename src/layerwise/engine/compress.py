"""`compress`: the walk, taken to its end, with what came of it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import DataError
from ..passes import Forward, Waiting
from ..plan import Plan
from ..solvers.base import Solver
from ..structure import Structure, structure_of
from ..tasks.batches import Batches, call
from .events import BlockFinished, Event, LayerSolved, PassesWaiting
from .walk import Settings, walk


@dataclass(frozen=True)
class Result:
    """What a walk did. `seconds`: collect, solve, propagate, and total wall time. `kept`: weights of the layers that the plan names
    and leaves whole; they count in its budget."""

    layers: tuple[LayerSolved, ...]
    seconds: dict[str, float]
    solver: dict[str, Any]
    data: dict[str, Any]
    kept: int = 0
    waiting: Waiting | None = None  # the estimate of what calibration held in memory; None without calibration

    @property
    def zeros(self) -> int:
        """Weights that are zero in the layers that were solved."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def size(self) -> int:
        """Weights of all layers that the plan shares its budget over, solved or kept whole."""
        return sum(layer.size for layer in self.layers) + self.kept

    @property
    def sparsity(self) -> float:
        """Zeros over `size`, as the plan's budget counts; 0.0 if there were no layers."""
        return self.zeros / self.size if self.size else 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: fallbacks, raised dampings, experts without tokens; with the layer's name."""
        return tuple(f"{layer.layer}: {note}" for layer in self.layers for note in layer.notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "zeros": self.zeros,
            "size": self.size,
            "sparsity": self.sparsity,
            "notes": list(self.notes),
        }


def compress(
    model: nn.Module,
    plan: Plan,
    *,
    solver: Solver,
    data: Batches | None = None,
    settings: Settings | None = None,
    structure: Structure | None = None,
    forward: Forward = call,
    progress: Callable[[Event], None] | None = None,
) -> Result:
    """Apply the plan to the model in place, block by block. Errors as of `walk`.

    data: calibration batches; a solver that looks at weights alone needs none. progress: called with every event.
    """
    if data is not None and not isinstance(data, Batches):  # else it shows when the model is pruned already
        raise DataError(f"data is a {type(data).__name__}: wrap its batches, which are dictionaries of what forward takes:"
                        " Batches(tuple(data), {}).")  # fmt: skip
    started = time.perf_counter()
    structure = structure or structure_of(model, include=["*"])
    layers: list[LayerSolved] = []
    waiting: Waiting | None = None
    seconds = {"collect": 0.0, "solve": 0.0, "propagate": 0.0}
    for event in walk(model, plan, solver, data, settings=settings, structure=structure, forward=forward):
        if progress is not None:
            progress(event)
        if isinstance(event, LayerSolved):
            layers.append(event)
        elif isinstance(event, PassesWaiting):
            waiting = event.waiting
        elif isinstance(event, BlockFinished):
            for part, spent in event.seconds.items():
                seconds[part] += spent
    seconds["total"] = time.perf_counter() - started
    facts = {**data.protocol, "hash": data.hash} if data is not None and solver.needs != "none" else {}
    solved = {layer.layer for layer in layers}
    whole = plan.zeros(structure.layers).keys() - solved
    kept = sum(layer.size for layer in structure.layers if layer.name in whole)
    return Result(tuple(layers), seconds, {"name": solver.name, **asdict(solver)}, facts, kept, waiting)  # type: ignore[call-overload]
