"""Trying plans: prune a model, let somebody look, and put the dense weights back. A search tries many."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import ConfigError
from ..passes import InputStatistics, collect_dense, store_of
from ..plan import Plan
from ..solvers.base import Solver
from ..structure import Layer, Structure, parameter_of
from ..tasks.batches import Batches
from .compress import compress
from .settings import Settings
from .solving import solve_group
from .walk import check, check_solver


@dataclass
class _Known:
    """What a `SharedInput` offers to who solves it, with the statistics at hand."""

    layers: Sequence[Layer]
    found: list[InputStatistics | None]

    def statistics(self) -> list[InputStatistics | None]:
        return self.found


class Trials:
    """Plans for one model, tried one after the other with one solver; the model holds its own weights in between.

    A solver that asks for no more than sums of squares is tried with those of the dense model, collected once: a trial then costs
    nothing but the masks. One that asks for the gram walks over the model each time. Holds a copy of the layers' weights.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, solver: Solver, data: Batches, settings: Settings | None = None
    ) -> None:
        if store_of(model) is not None:
            raise ConfigError(
                "plans cannot be tried on a streamed model: load it whole, or choose a method that needs no trials."
            )
        # by this process alone: whoever searches need not do so on every rank
        self.settings = replace(settings or Settings(), work=None, alone=True)
        self.model, self.structure, self.solver, self.data = model, structure, solver, data
        self._dense = {layer.name: parameter_of(model, layer).detach().clone() for layer in structure.layers}
        self._known: dict[str, list[InputStatistics | None]] = {}
        if solver.needs == "squares":
            found_in = collect_dense(model, structure, data, "squares", device=self.settings.device, outside=True)
            for _, found in found_in:
                self._known |= found

    @contextmanager
    def pruned(self, plan: Plan) -> Iterator[tuple[str, ...]]:
        """Within, the model is pruned; yields the solver's notes. Errors as of `compress`."""
        try:
            yield self._by_walk(plan) if self.solver.needs == "gram" else self._by_masks(plan)
        finally:
            with torch.no_grad():
                for layer in self.structure.layers:
                    parameter_of(self.model, layer).copy_(self._dense[layer.name])

    def _by_walk(self, plan: Plan) -> tuple[str, ...]:
        result = compress(
            self.model, plan, solver=self.solver, data=self.data, settings=self.settings, structure=self.structure
        )
        return result.notes

    def _by_masks(self, plan: Plan) -> tuple[str, ...]:
        ways = check(plan, self.structure, self.solver)
        check_solver(self.solver, ways, self.structure, self.data)
        notes: list[str] = []
        for layer in self.structure.layers:
            if layer.name in ways:
                group = _Known([layer], self._known.get(layer.name, [None] * layer.matrices))
                for event in solve_group(self.model, group, ways, self.solver, self.settings.seed):
                    notes += [f"{event.layer}: {note}" for note in event.notes]
        return tuple(notes)
