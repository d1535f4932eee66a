"""ER, ERK and ERK+: densities from shapes alone; layers with few weights per input and output keep more of them.

Sources: ER, Mocanu et al. 2018 (SET); ERK, Evci et al. 2020 (RigL, arXiv:1911.11134); ERK+, Liu et al. 2022 (arXiv:2202.02643). For
matrices ER and ERK are one. Equal parameters are not equal compute: on ResNet-50 ERK costs about twice the operations of uniform.
Departures: D1 counts are met exactly, by largest remainder. D2 only weights that multiply an input count, no norm's gain.
D3 where ERK+ cannot be met the official code empties the body in silence; here that is an error. D4 experts count as
matrices, one by one.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import filter as matching
from typing import ClassVar

from torch import nn

from ..allocate import check_feasible, erdos_renyi
from ..errors import ConfigError, SelectionError
from ..plan import Plan
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import found, last_of, plan_of, shape_of, sizes_of
from .base import Method, check_sparsities


@dataclass(frozen=True)
class ER:
    """Erdős–Rényi: density in proportion to (inputs + outputs) / (inputs * outputs)."""

    name: ClassVar[str] = "er"
    summary: ClassVar[str] = "densities by (inputs + outputs) / (inputs * outputs) of each layer"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.8
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("ER", self.sparsity, self.min_sparsity, self.max_sparsity)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        low, high = self.min_sparsity, self.max_sparsity
        return _plan(self, model, found(model, structure), self.sparsity, low, high, kernel=False)


@dataclass(frozen=True)
class ERK:
    """ER that counts the kernel of a convolution too: density by (sum of all dimensions) / (product), to a power."""

    name: ClassVar[str] = "erk"
    summary: ClassVar[str] = "like er, and convolution kernels count: small layers keep more"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.8
    power: float = 1.0  # 0 is uniform; 1 in all published runs
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        _check("ERK", self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`."""
        low, high = self.min_sparsity, self.max_sparsity
        return _plan(self, model, found(model, structure), self.sparsity, low, high, power=self.power)


@dataclass(frozen=True)
class ERKPlus:
    """ERK with the classifier kept dense, for large networks with a large classifier."""

    name: ClassVar[str] = "erk-plus"
    summary: ClassVar[str] = "erk with the head (else the last layer) kept dense"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.8
    dense: str = ""  # glob over names of layers; "": the head where it is up for compression, else the last layer
    power: float = 1.0
    min_sparsity: float = 0.0  # bounds of the layers that are not kept dense
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        _check("ERKPlus", self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises SelectionError if `dense` matches no layer."""
        structure = found(model, structure)
        names = [layer.name for layer in structure]
        dense = matching(names, self.dense) if self.dense else [last_of(model, structure).name]
        if not dense:
            raise SelectionError(f'ERKPlus.dense="{self.dense}" matches none of the {len(names)} layers.')
        low, high = self.min_sparsity, self.max_sparsity
        return _plan(self, model, structure, self.sparsity, low, high, power=self.power, dense=dense)


def _check(owner: str, method: ERK | ERKPlus) -> None:
    check_sparsities(owner, method.sparsity, method.min_sparsity, method.max_sparsity)
    if not 0 <= method.power < float("inf"):
        raise ConfigError(f"{owner}.power={method.power:g}: give a number, at least 0.")


def _plan(
    method: Method,
    model: nn.Module,
    structure: Structure,
    sparsity: float,
    low: float,
    high: float,
    *,
    kernel: bool = True,
    power: float = 1.0,
    dense: Collection[str] = (),
) -> Plan:
    sizes = sizes_of(structure)
    lows, highs = ({name: 0.0 if name in dense else bound for name in sizes} for bound in (low, high))
    check_feasible(sizes, sparsity, lows, highs)
    shapes = {layer.name: shape_of(layer) for layer in structure}
    densities = erdos_renyi(shapes, 1 - sparsity, kernel, power, dense, sizes=sizes, low=1 - high, high=1 - low)
    sparsities = {name: 1 - density for name, density in densities.items()}
    return plan_of(method, model, structure, sparsity, sparsities, lows, highs)
