"""Uniform: the same sparsity for every layer; what every other method has to beat.

Unstructured, or in a pattern: n:m (n kept of every m consecutive inputs), row, column, block(rows×columns).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from pydantic import ValidationError
from torch import nn

from ..allocate import uniform
from ..errors import ConfigError
from ..plan import Plan, Prune
from ..structure import Layer, Structure
from ..tasks.batches import Batches
from .assemble import dividing, found, plan_of, plan_with, sizes_of
from .base import check_sparsities

NEAR = 0.005  # of the sparsity; what whole units of a pattern miss beyond it is said


@dataclass(frozen=True)
class Uniform:
    """One sparsity for all. With a pattern other than unstructured, each layer meets it up to its whole rows, columns or blocks."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "the same sparsity for every layer, unstructured or in a pattern such as 2:4"
    needs_data: ClassVar[bool] = False

    sparsity: float | None = None  # None: what n:m means, else 0.5; a number as soon as the object is made
    pattern: str = "unstructured"
    indivisible: Literal["error", "dense"] = "error"  # layers that the pattern does not divide: refuse, or leave out

    def __post_init__(self) -> None:
        nm = Prune.model_construct(sparsity=0.0, pattern=self.pattern).nm
        meant = 1 - nm[0] / nm[1] if nm and 0 < nm[0] <= nm[1] else 0.5
        object.__setattr__(self, "sparsity", meant if self.sparsity is None else self.sparsity)
        check_sparsities("Uniform", self._sparsity)
        try:
            Prune(sparsity=self._sparsity, pattern=self.pattern)
        except ValidationError as error:
            problem = error.errors()[0]
            right = f"{Prune.model_fields['pattern'].description}." if problem["loc"] else ""
            message = str(problem["msg"]).removeprefix("Value error, ")
            raise ConfigError(
                f'Uniform.pattern="{self.pattern}", sparsity={self._sparsity:g}: {message}. {right}'.strip()
            ) from error
        if self.indivisible not in ("error", "dense"):
            raise ConfigError(f'Uniform.indivisible="{self.indivisible}": give "error" or "dense".')

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `Method.plan`. Raises ShapeError naming the layers that the pattern does not divide."""
        structure = found(model, structure)
        if self.pattern == "unstructured":
            shares = uniform(sizes_of(structure), self._sparsity)
            return plan_of(self, model, structure, self._sparsity, shares)
        prune = Prune(sparsity=self._sparsity, pattern=self.pattern)
        layers = dividing(structure, prune, self.indivisible)
        prunes = {layer.name: prune for layer in layers}
        return plan_with(self, model, structure, self._sparsity, prunes, notes=self._missed(prune, layers))

    def _missed(self, prune: Prune, layers: Sequence[Layer]) -> list[str]:
        """What whole rows, columns or blocks make of the budget, where that is not what was asked for."""
        zeros = {layer.name: prune.zeros(layer.size, layer.rows, layer.columns) for layer in layers}
        got = sum(zeros.values()) / max(1, sum(layer.size for layer in layers))
        if abs(got - self._sparsity) <= NEAR:
            return []
        far = max(layers, key=lambda layer: abs(zeros[layer.name] / layer.size - self._sparsity))
        share = zeros[far.name] / far.size
        return [
            f"whole units of {prune.pattern} make {got:.2%} of the {self._sparsity:.2%} asked for: each layer rounds to them, {far.name}"
            f" to {share:.0%}. A smaller unit comes nearer."
        ]

    @property
    def _sparsity(self) -> float:
        return cast(float, self.sparsity)
