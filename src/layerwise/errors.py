"""Every error that layerwise raises on purpose. The command line prints its one line; `exit_code` is what it returns.

A bad request (2) is found before any work and leaves nothing behind; a failed run (1) happens on the way.
"""

from collections.abc import Sequence


class LayerwiseError(Exception):
    """Base of all; the message says what was wrong, where, and what to do."""

    exit_code = 1


class BadRequest(LayerwiseError):
    """The request cannot be carried out as it stands; nothing was written."""

    exit_code = 2


class ConfigError(BadRequest):
    """A setting outside its range, or two that cannot go together."""


class ModelError(BadRequest):
    """The model cannot be found, read, or understood."""


class DataError(BadRequest):
    """Calibration or evaluation data that cannot be used."""


class BudgetError(BadRequest):
    """A budget that the layers cannot meet; the message says what would be feasible."""


class SelectionError(BadRequest):
    """A pattern of names that matches nothing."""


class OutputError(BadRequest):
    """The output exists already, or cannot be made where it was asked for."""


class MissingExtra(BadRequest):
    """An optional package is not installed; the message names the command that installs it."""


class PlanError(BadRequest):
    """A plan that is malformed or does not fit the model. `problems` has every one, a line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ShapeError(BadRequest):
    """A weight whose shape does not allow what was asked."""


class ScoreError(LayerwiseError):
    """A score came out non-finite or cannot be computed on this model."""


class StatisticsError(LayerwiseError):
    """Calibration statistics that are not finite; the message names the layer."""


class SolveError(LayerwiseError):
    """A solver failed on one layer (a factorisation, a non-finite weight)."""


class TrainError(LayerwiseError):
    """Training went wrong on the way, such as a loss that is not finite."""


class WalkError(LayerwiseError):
    """The model does something that paused forward passes cannot follow."""


class SaveError(LayerwiseError):
    """Writing failed, or the saved model does not load back to the same outputs."""
