"""The plan: which layer gets which treatment. One YAML file that people read, edit, diff, and apply again.

A plan knows names and numbers, no torch model: `Plan.check` takes the sizes of the layers (`structure.parts.Layer`, or anything
with `name`, `size`, `rows`, `columns`) and lists every problem, not only the first.
"""

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticSerializationError, to_jsonable_python

from .errors import BudgetError, OutputError, PlanError, SelectionError
from .files import output_file
from .plan_bits import Budget, bits_taken, over_budget
from .plan_check import Sized, entry_problems
from .plan_diff import Change, differences
from .plan_shift import shift_evenly
from .plan_text import describe, parse, to_yaml
from .treatments import (
    FIELDS,
    CacheBits,
    Count,
    Factorize,
    GroupBits,
    KeepTokens,
    Number,
    Prune,
    Quantize,
    Record,
    Resize,
    Train,
    Treatment,
    Treatments,
    bare,
)

__all__ = [
    "Budget",
    "CacheBits",
    "Change",
    "Factorize",
    "GroupBits",
    "KeepTokens",
    "ModelFacts",
    "Plan",
    "Prune",
    "Quantize",
    "Resize",
    "Sized",
    "Train",
    "Treatment",
    "Treatments",
    "diff_plans",
]


class ModelFacts(Record):
    """The model that a plan was made for."""

    name: str
    parameters: Count
    fingerprint: str


class Plan(Record):
    """The whole decision. `method` and `solver` take a settings dataclass or plain values; `layers` takes bare treatments too."""

    layerwise: Literal[1] = Field(default=1, description="this layerwise reads format 1; a newer one may read it")
    model: ModelFacts | None = None
    method: dict[str, Any] = Field(default_factory=dict)
    budget: Budget = Budget()
    solver: dict[str, Any] | None = None
    layers: dict[str, Treatments]
    scores: dict[str, Number] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the method did otherwise than asked, one sentence each

    @field_validator("method", "solver", mode="before")
    @classmethod
    def _settings(cls, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {"name": getattr(value, "name", type(value).__name__.lower()), **dataclasses.asdict(value)}
        try:
            return to_jsonable_python(value)  # so that a plan read back equals the one written: tuples are lists
        except PydanticSerializationError as error:
            raise ValueError(f"settings are plain values: {error}") from error

    @field_validator("layers", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {name: bare(treatment) for name, treatment in value.items()} if isinstance(value, Mapping) else value

    def zeros(self, layers: Iterable[Sized]) -> dict[str, int]:
        """Layer name -> exact number of weights that the plan sets to zero, for the layers it prunes."""
        known = {layer.name: layer for layer in layers}
        return {
            name: t.prune.zeros(known[name].size, known[name].rows, known[name].columns)
            for name, t in self.layers.items()
            if t.prune and name in known
        }

    def achieved_sparsity(self, layers: Iterable[Sized]) -> float:
        """Zeros over all weights of the layers that the plan prunes; 0.0 if it prunes none."""
        layers = list(layers)
        zeros, sizes = self.zeros(layers), {layer.name: layer.size for layer in layers}
        total = sum(sizes[name] for name in zeros)
        return sum(zeros.values()) / total if total else 0.0

    def achieved_bits(self, layers: Iterable[Sized], *, nominal: bool = False) -> float:
        """Bits per weight of the layers that the plan quantises or factorises, scales and zeros, or factors, counted unless `nominal`; 0.0
        if there are none."""
        bits, weights = bits_taken(self.layers, layers, nominal=nominal, group_bits=self.budget.group_bits)
        return bits / weights if weights else 0.0

    def stored_with(self, group_bits: GroupBits) -> "Plan":
        """The same plan with its bits counted for a solver that stores this of each group."""
        return self.model_copy(update={"budget": self.budget.counting(group_bits)})

    def with_achieved(self, layers: Iterable[Sized]) -> "Plan":
        """The same plan with what the budget's layers achieve computed from these: sparsity where it prunes, bits where it quantises."""
        layers = list(layers)
        bits = self.achieved_bits(layers) or None
        prunes = not self.layers or any(entry.prune for entry in self.layers.values())
        found = {
            "achieved": self.achieved_sparsity(layers) if prunes else None,
            "achieved_bits": bits,
            "nominal_bits": self.achieved_bits(layers, nominal=True) or None,
        }
        return self.model_copy(update={"budget": self.budget.model_copy(update=found)})

    def check(
        self,
        layers: Iterable[Sized],
        *,
        blocks: Iterable[str] = (),
        attentions: Iterable[str] = (),
        fingerprint: str | None = None,
    ) -> None:
        """Raise PlanError listing every way in which this plan does not fit these layers, blocks and attentions.

        Of the budget, `sparsity` is checked: each layer may be off by its rounding (one weight, row, column or block); and `bits`, which
        the layers that are quantised must not exceed.
        """
        known, blocks, attentions = {layer.name: layer for layer in layers}, set(blocks), tuple(attentions)
        if fingerprint:
            self.check_model(fingerprint, {*known, *blocks})
        problems = []
        for number, (name, treatments) in enumerate(self.layers.items(), start=1):
            problems += entry_problems(number, name, treatments, self.layers, known, blocks, attentions)
        if not problems:
            problems += self._budget_problems(list(known.values()))
        if problems:
            raise PlanError(problems)

    def check_model(self, fingerprint: str, names: Collection[str]) -> None:
        """Raise PlanError if the plan says that it was made for a model of other parameters. names: what this one has that entries name."""
        if self.model and self.model.fingerprint != fingerprint:  # everything else would follow from it
            absent = sum(name not in names for name in self.layers)
            raise PlanError(
                f'plan: it was made for "{self.model.name}" ({self.model.fingerprint[:15]}…); this model has other parameters'
                f" ({fingerprint[:15]}…), and {absent} of the plan's {len(self.layers)} entries are not in it."
                " Make a plan for this model, or remove the plan's model entry."
            )

    def _budget_problems(self, layers: list[Sized]) -> list[str]:
        budget, over = self.budget, []
        bits, weights = bits_taken(self.layers, layers, nominal=bool(budget.nominal), group_bits=budget.group_bits)
        if budget.bits is not None and weights:
            over = over_budget(budget.bits, bits, weights, budget.group_bits)
        known = {layer.name: layer for layer in layers}
        zeros, wanted = self.zeros(layers), self.budget.sparsity
        total, got = sum(known[name].size for name in zeros), sum(zeros.values())
        prunes = [(name, prune) for name in zeros if (prune := self.layers[name].prune)]
        rounding = sum(prune.unit(known[name].rows, known[name].columns) for name, prune in prunes)
        if wanted is None or abs(round(wanted * total) - got) <= rounding:
            return over
        achieved = got / total if total else 0.0
        return [
            *over,
            f"plan: budget.sparsity {wanted:g} is {round(wanted * total)} zeros of {total}, the layers give {got} ({achieved:.6f})."
            f" Rebalance the layers, or set budget.sparsity to {achieved!r}.",
        ]

    def rebalance(self, layers: Iterable[Sized], keep: Sequence[str] = ()) -> "Plan":
        """After edits by hand: layers whose names match a glob of `keep` stay, the others shift evenly to meet budget.sparsity.

        The shift is the same for all, clipped to [0, 1]; the number of zeros is met exactly. Patterns other than unstructured
        stay too. Raises SelectionError for a glob that matches no pruned layer, BudgetError saying what is feasible.
        """
        layers = list(layers)
        sizes = {layer.name: layer.size for layer in layers}
        zeros = self.zeros(layers)
        for pattern in keep:
            if not fnmatch.filter(zeros, pattern):
                raise SelectionError(f'"{pattern}" matches none of the {len(zeros)} layers that the plan prunes.')
        if self.budget.sparsity is None:
            what = "budget.bits are met by changing levels by hand, or by a method" if self.budget.bits else "Add it"
            raise BudgetError(
                f"plan: it has no budget.sparsity to meet. {what}, such as {'lwq' if self.budget.bits else 'budget: {sparsity: 0.5}'}."
            )
        prunes = {name: prune for name in zeros if (prune := self.layers[name].prune)}
        free = [
            name
            for name, prune in prunes.items()
            if prune.pattern == "unstructured" and not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
        ]
        total, room = sum(sizes[name] for name in zeros), sum(sizes[name] for name in free)
        fixed = sum(zeros.values()) - sum(zeros[name] for name in free)
        wanted = round(self.budget.sparsity * total) - fixed
        if not 0 <= wanted <= room:
            low, high = fixed / total if total else 0.0, (fixed + room) / total if total else 0.0
            raise BudgetError(
                f"plan: budget.sparsity {self.budget.sparsity:g} cannot be met: with {len(zeros) - len(free)} of {len(zeros)}"
                f" layers fixed, {low:.6f} to {high:.6f} is feasible. Keep fewer layers, or change the budget."
            )
        counts = shift_evenly([sizes[name] for name in free], [prunes[name].sparsity for name in free], wanted)
        new = dict(self.layers)
        for name, count in zip(free, counts, strict=True):
            new[name] = new[name].model_copy(
                update={"prune": Prune(sparsity=count / sizes[name] if sizes[name] else 0.0)}
            )
        return self.model_copy(update={"layers": new}).with_achieved(layers)

    @property
    def fingerprint(self) -> str:
        """ "sha256:..." of the YAML text: equal for equal plans."""
        return f"sha256:{hashlib.sha256(self.to_yaml().encode()).hexdigest()}"

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write YAML, or JSON for a name that ends in .json; whole or not at all. Raises OutputError (exists, not writable)."""
        path = Path(path)
        if path.exists() and not force:
            raise OutputError(
                f'output "{path}" exists already. Give another name, or replace it: force=True (--force).'
            )
        with output_file(path) as partial:
            partial.write_text(self.to_json() if path.suffix == ".json" else self.to_yaml(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, empty entries left out."""
        plain = self.model_dump(mode="json")
        return {key: value for key, value in plain.items() if value or key in ("layerwise", "layers")}

    def to_yaml(self) -> str:
        """One line a layer, so that plans can be read, edited and compared line by line."""
        return to_yaml(self.to_dict(), by_line=("layers", "scores"))

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read YAML or JSON. Raises PlanError with one line for each problem."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PlanError(
                f"{path}: not a text file (byte {error.start}). A plan is YAML or JSON in UTF-8."
            ) from error
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror}.") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, source: str = "plan") -> "Plan":
        """Parse YAML or, if `source` ends in .json, JSON text; `source` names it in messages."""
        data = parse(text, source)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(
                [describe(source, dict(problem), _holder(problem["loc"])) for problem in error.errors()]
            ) from error


def diff_plans(a: Plan, b: Plan) -> list[Change]:
    """What turns plan `a` into plan `b`, settings first, then layers in the order of the plans. Scores are left out."""
    return differences(a.to_dict(), b.to_dict())


def _holder(location: Sequence[str | int]) -> type[Record] | None:
    """The record class that the last key of a location belongs to."""
    match [str(part) for part in location]:
        case [_]:
            return Plan
        case ["model", _]:
            return ModelFacts
        case ["budget", *_]:
            return Budget
        case ["layers", _, _]:
            return Treatments
        case ["layers", _, field, *_]:
            return FIELDS.get(field)
    return None
