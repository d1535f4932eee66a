"""Uniform+: uniform but for the first layer, kept dense, and the last, kept at 20 % or more (Gale et al. 2019, arXiv:1902.09574).

Needs shapes only. Departures from the code of Liu et al. 2022 (arXiv:2202.02643): D1 its arithmetic misses the budget, here it is met
exactly. D2 it takes parameters named "conv.weight" and "fc.weight"; here the first and last layer in the order of the model, and
the head where there is one.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..allocate import uniform_plus
from ..errors import ConfigError
from ..plan import Plan
from ..structure import Structure, in_order
from ..tasks.batches import Batches
from .assemble import found, last_of, named, plan_of, sizes_of
from .base import check_sparsities


@dataclass(frozen=True)
class UniformPlus:
    """Meant for convolutional networks with their stem and classifier in (include "*"); their two ends are small and fragile."""

    name: ClassVar[str] = "uniform-plus"
    summary: ClassVar[str] = "uniform, but the first layer stays dense and the last keeps 20 % or more"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.8
    last_density: float = 0.2  # the last layer keeps at least this
    first: str = ""  # names of layers, where the order of the model is not the order they run in
    last: str = ""

    def __post_init__(self) -> None:
        check_sparsities("UniformPlus", self.sparsity)
        if not 0 <= self.last_density <= 1:
            raise ConfigError(f"UniformPlus.last_density={self.last_density:g}: give a fraction kept, 0 to 1.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises SelectionError for a `first` or `last` that is no layer."""
        structure = found(model, structure)
        first = named(structure, self.first) if self.first else in_order(model, structure)[0].name
        last = named(structure, self.last) if self.last else last_of(model, structure).name
        shares = uniform_plus(sizes_of(structure), self.sparsity, first, last, self.last_density)
        caps = dict.fromkeys(shares, 1.0) | {last: 1 - self.last_density} | {first: 0.0}
        return plan_of(self, model, structure, self.sparsity, shares, 0.0, caps)
