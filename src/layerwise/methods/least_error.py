"""Least error: bits chosen by what every layer loses at every level, measured with the solver that will be used.

Each layer is solved once at each level on the dense model's inputs; the errors of its outputs are kept, and the levels of least summed
error within the budget are found exactly (a multiple-choice knapsack). The order of a score says which layer comes before which; errors say
how much a bit is worth where, at each level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..allocate import Errors, hull_levels, least_error_levels
from ..errors import LayerwiseError
from ..passes import InputStatistics, collect_dense
from ..plan import Plan
from ..randomness import generator_for
from ..scores import output_error, output_gradients, tell
from ..solvers import Solver, solver_from
from ..structure import Layer, Structure, as_matrices, parameter_of
from ..tasks.batches import Batches
from .base import needed
from .handing_out import BitSettings, Hand, Unit, dealt

Weighting = Literal["gradient", "relative", "none"]
Rule = Literal["exact", "hull"]


@dataclass(frozen=True)
class LeastError(BitSettings):
    """Defaults: layer by layer, by round to nearest, outputs weighed by the loss's gradient."""

    name: ClassVar[str] = "least-error"
    summary: ClassVar[str] = (
        "bits per layer or block of least summed output error, each measured at each level; the optimum exactly"
    )
    needs_data: ClassVar[bool] = True

    granularity: Unit = "layer"  # what shares one level
    solver: str = "round_to_nearest"  # whose errors are measured; compress hands in its own
    weighting: Weighting = (
        "gradient"  # of outputs: by the loss's gradient, as shares of the layer's outputs, or as they are
    )
    rule: Rule = "exact"  # or hull: the largest fall of error per bit first
    seed: int = 0  # of solvers that draw

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_words("weighting", get_args(Weighting))
        self.check_words("rule", get_args(Rule))

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ConfigError for an unknown solver, ShapeError (groups), and what the solver raises."""
        hand, solver = dealt(self, self, model, structure), solver_from({"name": self.solver})
        errors, notes = measured_errors(model, needed("LeastError", data), hand, solver, self.weighting, self.seed)
        return self.plan_by(model, hand, errors, notes)

    def plan_by(self, model: nn.Module, hand: Hand, errors: Errors, notes: Sequence[str] = ()) -> Plan:
        """The plan by errors of layers that were measured before: another budget, other levels of those or ties ask for nothing new."""
        apart = {unit for unit, layers in hand.units.items() if any(layer.name not in errors for layer in layers)}
        costs = {unit: {max(of): of[max(of)]} if unit in apart else of for unit, of in hand.costs.items()}
        by_unit = {
            unit: {
                level: sum(errors[layer.name][level] for layer in layers if unit not in apart) for level in costs[unit]
            }
            for unit, layers in hand.units.items()
        }
        rule = least_error_levels if self.rule == "exact" else hull_levels
        choice = rule(by_unit, costs, hand.sizes, self.bits)
        gains = {unit: of[min(of)] - of[max(of)] for unit, of in by_unit.items() if len(of) > 1}
        notes = [
            *notes,
            *([f"{len(apart)} layers without measured errors stay at the highest level."] if apart else []),
        ]
        if self.rule == "exact" and not choice.exact:
            notes.append(f"the summed error is at most {choice.error / choice.bound - 1:.2%} above the least possible.")
        return hand.plan(model, choice.levels, gains, notes)


def measured_errors(
    model: nn.Module, data: Batches, hand: Hand, solver: Solver, weighting: Weighting, seed: int = 0
) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Layer name -> level -> error of its outputs when it alone is solved at that level, and what the user should know.

    One pass over the dense model, and with weighting="gradient" one forward and backward pass before. Layers that share an input are solved
    together, level by level. A matrix that no token reached (an expert) adds nothing, which is in the notes; a layer whose inputs cannot be
    seen is not in the result.
    """
    names = {layer.name for layers in hand.units.values() for layer in layers}
    gradients = output_gradients(model, data, hand.structure) if weighting == "gradient" else {}
    meter = _Meter(model, hand, solver, weighting, gradients, seed)
    found: dict[str, dict[int, float]] = {}
    for block, statistics in collect_dense(model, hand.structure, data, "gram", outside=True):
        tell(len(found), len(names), block.name)
        inside = [layer for layer in block.layers if layer.name in names]
        for layers in _sharing(inside, statistics):
            found |= meter.errors_of(layers, statistics[layers[0].name])
    tell(len(names), len(names))
    unreached = f"{meter.unreached} matrices met no token: what they lose counts as nothing."
    return found, [unreached] if meter.unreached else []


@dataclass
class _Meter:
    """Solves layers on what they were handed, and counts what their outputs lose."""

    model: nn.Module
    hand: Hand
    solver: Solver
    weighting: Weighting
    gradients: Mapping[str, Tensor]
    seed: int
    unreached: int = 0

    def errors_of(
        self, layers: Sequence[Layer], statistics: Sequence[InputStatistics | None]
    ) -> dict[str, dict[int, float]]:
        """Layer name -> level -> error, of layers that share an input. Errors of the solver name them."""
        levels = self.hand.settings.chosen_levels
        found = {layer.name: dict.fromkeys(levels, 0.0) for layer in layers}
        for index, inputs in enumerate(statistics):
            if inputs is None or inputs.gram is None or not inputs.tokens:
                self.unreached += len(layers)
                continue
            device = inputs.gram.device
            matrices = [
                as_matrices(parameter_of(self.model, layer).detach(), layer)[index].float().to(device)
                for layer in layers
            ]
            weights = [
                self._importance(layer, index, matrix, inputs) for layer, matrix in zip(layers, matrices, strict=True)
            ]
            for level in levels:
                solved = self._solved(layers, index, matrices, inputs, level)
                for layer, matrix, weight, new in zip(layers, matrices, weights, solved, strict=True):
                    found[layer.name][level] += output_error(matrix - new, inputs.gram, weight)
        return found

    def _solved(
        self, layers: Sequence[Layer], index: int, matrices: Sequence[Tensor], inputs: InputStatistics, level: int
    ) -> list[Tensor]:
        treatments: list[Any] = [self.hand.treatment(layer, level) for layer in layers]
        draws = [generator_for(self.seed, f"{layer.name}:{index}") for layer in layers]
        try:
            solved = self.solver.solve(matrices, inputs if self.solver.needs != "none" else None, treatments, draws)
        except LayerwiseError as error:  # a solver does not know which layer it works on
            raise type(error)(f'layer "{", ".join(layer.name for layer in layers)}": {error}') from error
        return [one.weight for one in solved]

    def _importance(self, layer: Layer, index: int, matrix: Tensor, inputs: InputStatistics) -> Tensor | None:
        """(rows,) what the squared error of each output is multiplied with; None: 1."""
        if self.weighting == "gradient":
            return self.gradients[layer.name][index] / inputs.tokens
        if self.weighting == "relative":
            assert inputs.gram is not None  # noqa: S101  (asked for)
            size = output_error(matrix, inputs.gram)
            return torch.full((layer.rows,), 1 / size if size else 0.0)
        return None


def _sharing(layers: Sequence[Layer], statistics: Mapping[str, list[InputStatistics | None]]) -> list[list[Layer]]:
    """Layers by the input that they share: `collect_dense` hands out one list for all of them."""
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(id(statistics[layer.name]), []).append(layer)
    return list(groups.values())
