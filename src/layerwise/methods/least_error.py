"""Least error: bits chosen by what every layer loses at every level, measured with the solver that will be applied.

Each layer is solved once at each level, alone; what that costs is measured (`level_errors`), and the levels of least summed error within
the budget are found exactly (a multiple-choice knapsack). The order of a score says which layer comes before which; errors say how much
a bit is worth where, at each level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from ..allocate import Errors, hull_levels, least_error_levels
from ..errors import ConfigError
from ..plan import Plan
from ..settings import pairs
from ..solvers import Solver, group_bits_of, solver_from
from ..structure import Structure
from ..tasks.batches import Batches
from .base import needed
from .handing_out import BitSettings, Hand, Unit, dealt
from .level_errors import LevelErrors, divergences, output_errors

Measure = Literal["gradient", "divergence", "relative", "plain"]
Rule = Literal["exact", "hull"]


@dataclass(frozen=True)
class LeastError(BitSettings):
    """Defaults: layer by layer, by round to nearest, squared errors of outputs weighed by the loss's gradient."""

    name: ClassVar[str] = "least-error"
    summary: ClassVar[str] = (
        "bits per layer or block of least summed error, each measured at each level; the optimum exactly"
    )
    needs_data: ClassVar[bool] = True

    granularity: Unit = "layer"  # what shares one level
    solver: str = "round_to_nearest"  # whose errors are measured; compress hands in its own, with its settings
    solver_set: str = ""  # its settings, such as "damp=0.1,mse=true"; the others at their defaults
    # errors of outputs: weighed by the loss's gradient, as shares of the layer's outputs, plain; or divergence: of the
    # predictions, a forward pass for each layer and level, closer than the sum of output errors
    measure: Measure = "gradient"
    samples: int = 8  # of the data, for measure=divergence
    rule: Rule = "exact"  # or hull: the largest fall of error per bit first
    seed: int = 0  # of solvers that draw

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_words("measure", get_args(Measure))
        self.check_words("rule", get_args(Rule))
        if self.samples < 1:
            raise ConfigError(f"LeastError.samples={self.samples}: give at least 1.")
        stored = group_bits_of(self.applied)  # what is measured is what is stored, and counted
        object.__setattr__(self, "shift", self.shift or stored.shift)
        object.__setattr__(self, "scale_bits", max(self.scale_bits, stored.scale))

    @property
    def applied(self) -> Solver:
        """The solver whose errors are measured. Raises ConfigError for a name or setting that is none."""
        words = self.solver_set.split(",") if self.solver_set else ()
        return solver_from({"name": self.solver, **pairs(words, "LeastError.solver_set")})

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ShapeError (groups), and what solver and measure raise."""
        hand = dealt(self, self, model, structure)
        errors, notes = self.measured(model, needed("LeastError", data), hand)
        return self.plan_by(model, hand, errors, notes)

    def measured(self, model: nn.Module, data: Batches, hand: Hand) -> tuple[LevelErrors, list[str]]:
        """Unit -> level -> error, and notes. Units that could not be measured are not in the result."""
        if self.measure == "divergence":
            return divergences(model, data, hand, self.applied, self.samples, self.seed)
        found, notes = output_errors(model, data, hand, self.applied, self.measure, self.seed)
        return over_units(hand, found), notes

    def plan_by(self, model: nn.Module, hand: Hand, errors: Errors, notes: Sequence[str] = ()) -> Plan:
        """The plan by errors of units that were measured before: another budget, or some of those levels, ask for nothing new."""
        apart = hand.units.keys() - errors.keys()
        costs = {unit: {max(of): of[max(of)]} if unit in apart else of for unit, of in hand.costs.items()}
        by_unit = {
            unit: {level: 0.0 if unit in apart else errors[unit][level] for level in of} for unit, of in costs.items()
        }
        rule = least_error_levels if self.rule == "exact" else hull_levels
        choice = rule(by_unit, costs, hand.sizes, self.bits)
        gains = {unit: of[min(of)] - of[max(of)] for unit, of in by_unit.items() if len(of) > 1}
        notes = list(notes)
        if apart:
            notes.append(f"{len(apart)} layers without measured errors stay at the highest level.")
        if self.rule == "exact" and not choice.exact:
            notes.append(f"the summed error is at most {choice.error / choice.bound - 1:.2%} above the least possible.")
        return hand.plan(model, choice.levels, gains, notes)


def over_units(hand: Hand, errors: Errors) -> LevelErrors:
    """Unit -> level -> sum of the errors of its layers, of units all of whose layers have some."""
    return {
        unit: {level: sum(errors[layer.name][level] for layer in layers) for level in errors[layers[0].name]}
        for unit, layers in hand.units.items()
        if all(layer.name in errors for layer in layers)
    }
