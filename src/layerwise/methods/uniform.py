"""Uniform: the same sparsity for every layer; what every other method has to beat.

Unstructured, or in a pattern: n:m (n kept of every m consecutive inputs), row, column, block(rows×columns).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from pydantic import ValidationError
from torch import nn

from ..allocate import uniform
from ..errors import ConfigError
from ..plan import Plan, Prune
from ..structure import Structure
from ..tasks.batches import Batches
from .assemble import dividing, found, plan_of, plan_with, sizes_of
from .base import check_sparsities


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
        prunes = {layer.name: prune for layer in dividing(structure, prune, self.indivisible)}
        return plan_with(self, model, structure, self._sparsity, prunes)

    @property
    def _sparsity(self) -> float:
        return cast(float, self.sparsity)
