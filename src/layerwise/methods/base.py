"""What every method offers, and the checks that all of them share."""

from typing import ClassVar, Protocol

from torch import nn

from ..errors import ConfigError, DataError
from ..plan import Plan
from ..structure import Structure
from ..tasks.batches import Batches


class Method(Protocol):
    """A frozen dataclass of flat, plain settings, written into the plan; its defaults are the paper's."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for people
    needs_data: ClassVar[bool]

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """Decide for every layer of `structure` (None: `structure_of(model)`). The model is not touched.

        Raises BudgetError (what would be feasible), ModelError (no layers), DataError (a method that needs data got none).
        """
        ...


def check_sparsities(owner: str, sparsity: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ConfigError unless 0 <= sparsity < 1 and 0 <= low <= high <= 1."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"{owner}.sparsity={sparsity:g}: give the fraction removed, 0 <= sparsity < 1.")
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"{owner}.min_sparsity={low:g}, max_sparsity={high:g}: give 0 <= min_sparsity <= max_sparsity <= 1."
        )


def needed(owner: str, data: Batches | None) -> Batches:
    """The batches. Raises DataError if there are none."""
    if data is None or not len(data):
        raise DataError(f"{owner} looks at batches of the task and needs calibration data (--data).")
    return data
