"""The plan: which layer gets which treatment. One YAML file that people read, edit, diff, and apply again.

A plan knows names and numbers, no torch model: `Plan.check` takes the sizes of the layers (`structure.parts.Layer`, or anything
with `name`, `size`, `rows`, `columns`) and lists every problem, not only the first.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import PlanError

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_PATTERN = re.compile(r"unstructured|row|column|(?P<n>\d+):(?P<m>\d+)|block\((?P<rows>\d+)[x×](?P<columns>\d+)\)")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prune(_Record):
    """Set a fraction `sparsity` of the weights to zero. `n:m` keeps n of every m consecutive inputs of a row."""

    sparsity: Fraction
    pattern: str = "unstructured"

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        if not (match := _PATTERN.fullmatch(pattern)):
            raise ValueError('write "unstructured", "row", "column", "n:m" such as "2:4", or "block(16x16)"')
        if match["m"] and not 0 < int(match["n"]) <= int(match["m"]):
            raise ValueError("n:m keeps n of every m: 0 < n <= m")
        return pattern

    @model_validator(mode="after")
    def _agrees(self) -> "Prune":
        if (nm := self.nm) and abs(self.sparsity - (1 - nm[0] / nm[1])) > 1e-9:
            raise ValueError(f"pattern {self.pattern} means sparsity {1 - nm[0] / nm[1]:g}, not {self.sparsity:g}")
        return self

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n kept, m) of an n:m pattern, else None."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match["n"]), int(match["m"])) if match and match["m"] else None

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) of a block pattern, else None."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match["rows"]), int(match["columns"])) if match and match["rows"] else None


class Quantize(_Record):
    """`bits` per weight, one scale per `group` consecutive inputs (None: one per row)."""

    bits: Annotated[int, Field(ge=1, le=16)]
    group: Annotated[int, Field(ge=1)] | None = 128
    symmetric: bool = False


class Factorize(_Record):
    """Replace the weight by block-diagonal x sparse core x block-diagonal (ARMOR); `block` is the block's side."""

    block: Annotated[int, Field(ge=1)]
    pattern: str = "2:4"


class Resize(_Record):
    """Keep this many heads, key/value heads or channels."""

    heads: Annotated[int, Field(ge=0)] | None = None
    kv_heads: Annotated[int, Field(ge=0)] | None = None
    channels: Annotated[int, Field(ge=0)] | None = None


class CacheBits(_Record):
    """Bits of the KV cache of one attention."""

    key_bits: Annotated[int, Field(ge=1, le=16)]
    value_bits: Annotated[int, Field(ge=1, le=16)]


class KeepTokens(_Record):
    """Vision tokens that go on from this block, as a count or a fraction."""

    count: Annotated[int, Field(ge=1)] | None = None
    fraction: Fraction | None = None


class Train(_Record):
    """How much a layer or block is trained: a learning-rate multiplier, a probability of being sampled."""

    rate: Annotated[float, Field(ge=0)] | None = None
    probability: Fraction | None = None


Treatment = Prune | Quantize | Factorize | Resize | CacheBits | KeepTokens | Train
_FIELDS: dict[type, str] = {
    Prune: "prune",
    Quantize: "quantize",
    Factorize: "factorize",
    Resize: "resize",
    CacheBits: "cache",
    KeepTokens: "keep_tokens",
    Train: "train",
}


class Treatments(_Record):
    """All that one layer or block gets. `drop` removes a whole block."""

    prune: Prune | None = None
    quantize: Quantize | None = None
    factorize: Factorize | None = None
    resize: Resize | None = None
    cache: CacheBits | None = None
    keep_tokens: KeepTokens | None = None
    train: Train | None = None
    drop: Literal[True] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> "Treatments":
        chosen = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not chosen:
            raise ValueError("no treatment given; leave the layer out to leave it alone")
        if self.drop and len(chosen) > 1:
            raise ValueError(f"drop goes with nothing else, not with {' and '.join(n for n in chosen if n != 'drop')}")
        if self.factorize and (self.prune or self.quantize):
            raise ValueError("factorize goes with neither prune nor quantize")
        return self


class ModelFacts(_Record):
    """The model that a plan was made for."""

    name: str
    parameters: int
    fingerprint: str


class Budget(_Record):
    """What the layers of the plan may cost together. `sparsity` counts the layers that the plan prunes."""

    sparsity: Fraction | None = None
    parameters: float | None = None
    bits: float | None = None
    flops: float | None = None
    bytes: float | None = None
    achieved: float | None = None  # written for the reader; always computed from the layers, never trusted


class Sized(Protocol):
    """What `Plan.check` reads of a layer."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


class Plan(_Record):
    """The whole decision. `method` and `solver` take a settings dataclass or plain values; `layers` takes bare treatments too."""

    layerwise: Literal[1] = 1
    model: ModelFacts | None = None
    method: dict[str, Any] = {}
    budget: Budget = Budget()
    solver: dict[str, Any] | None = None
    layers: dict[str, Treatments]
    scores: dict[str, float] = {}

    @field_validator("method", "solver", mode="before")
    @classmethod
    def _settings(cls, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"name": getattr(value, "name", type(value).__name__.lower()), **dataclasses.asdict(value)}
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: {_FIELDS[type(t)]: t} if type(t) in _FIELDS else t for name, t in value.items()}

    def zeros(self, layers: Iterable[Sized]) -> dict[str, int]:
        """Layer name -> exact number of weights that the plan sets to zero, for the layers it prunes."""
        sizes = {layer.name: layer.size for layer in layers}
        return {
            name: round(t.prune.sparsity * sizes[name]) for name, t in self.layers.items() if t.prune and name in sizes
        }

    def achieved_sparsity(self, layers: Iterable[Sized]) -> float:
        """Zeros over all weights of the layers that the plan prunes; 0.0 if it prunes none."""
        layers = list(layers)
        zeros, sizes = self.zeros(layers), {layer.name: layer.size for layer in layers}
        total = sum(sizes[name] for name in zeros)
        return sum(zeros.values()) / total if total else 0.0

    def check(self, layers: Iterable[Sized], *, blocks: Iterable[str] = (), fingerprint: str | None = None) -> None:
        """Raise PlanError listing every way in which this plan does not fit these layers."""
        known = {layer.name: layer for layer in layers}
        problems = []
        if self.model and fingerprint and self.model.fingerprint != fingerprint:
            problems.append(
                f'plan: it was made for "{self.model.name}" ({self.model.fingerprint[:15]}…), this model has other'
                f" parameters ({fingerprint[:15]}…). Make a plan for this model, or remove the plan's model entry."
            )
        names = [*known, *blocks]
        for number, (name, treatments) in enumerate(self.layers.items(), start=1):
            if name not in known and name not in names and not any(n.startswith(f"{name}.") for n in names):
                problems.append(
                    f'plan: entry {number} names layer "{name}", which the model does not have.{_near(name, names)}'
                )
            elif treatments.prune and name not in known:
                problems.append(
                    f'plan: entry {number} prunes "{name}", which is not a layer with a weight. Name its layers.'
                )
            elif treatments.prune:
                problems += _prune_problems(known[name], treatments.prune)
        if not problems:
            problems += self._budget_problems(list(known.values()))
        if problems:
            raise PlanError(problems)

    def _budget_problems(self, layers: list[Sized]) -> list[str]:
        if self.budget.sparsity is None:
            return []
        zeros, sizes = self.zeros(layers), {layer.name: layer.size for layer in layers}
        total = sum(sizes[name] for name in zeros)
        wanted, got = round(self.budget.sparsity * total), sum(zeros.values())
        # one weight a layer: what rounding a hand-written sparsity can miss by
        if abs(wanted - got) <= len(zeros) or any(t.prune and t.prune.nm for t in self.layers.values()):
            return []
        return [
            f"plan: the layers give sparsity {got / total:.6f} ({got} zeros), the budget says {self.budget.sparsity:g} ({wanted})."
            f" Change the layers, or set budget.sparsity to {got / total:.6f}."
        ]

    @property
    def fingerprint(self) -> str:
        """ "sha256:..." of the YAML text: equal for equal plans."""
        return f"sha256:{hashlib.sha256(self.to_yaml().encode()).hexdigest()}"

    def save(self, path: str | Path) -> None:
        """Write YAML, or JSON for a name that ends in .json; whole or not at all."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1) if path.suffix == ".json" else self.to_yaml()
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text + "\n" if not text.endswith("\n") else text, encoding="utf-8")
        partial.replace(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, empty entries left out."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in plain.items() if value not in ({}, None)}

    def to_yaml(self) -> str:
        """One line a layer, so that plans can be read, edited and compared line by line."""
        plain = self.to_dict()
        lines = []
        for key, value in plain.items():
            if key in ("layers", "scores"):
                lines.append(f"{key}:")
                lines += [f"  {_flow(name)}: {_flow(entry)}" for name, entry in value.items()]
            else:
                lines.append(f"{key}: {_flow(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read YAML or JSON. Raises PlanError with one line for each problem."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot read the plan: {getattr(error, 'strerror', None) or error}.") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, source: str = "plan") -> "Plan":
        """Parse YAML or JSON text; `source` names it in messages."""
        try:
            data = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  (a SafeLoader)
        except yaml.MarkedYAMLError as error:
            where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            hint = " Use spaces, not tabs." if "\\t" in str(error.problem) else ""
            raise PlanError(f"{source}{where}: not valid YAML: {error.problem}.{hint}") from error
        except yaml.YAMLError as error:
            raise PlanError(f"{source}: not valid YAML: {str(error).splitlines()[0]}.") from error
        if not isinstance(data, dict):
            raise PlanError(f"{source}: a plan is a mapping that starts with 'layerwise: 1'.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError([_describe(source, problem) for problem in error.errors()]) from error


def _prune_problems(layer: Sized, prune: Prune) -> list[str]:
    problems = []
    if (nm := prune.nm) and layer.columns % nm[1]:
        problems.append(
            f'plan: layer "{layer.name}": {layer.columns} inputs do not split into groups of {nm[1]}. Leave it out or use unstructured.'
        )
    if (block := prune.block) and (layer.rows % block[0] or layer.columns % block[1]):
        problems.append(
            f'plan: layer "{layer.name}" of {layer.rows}x{layer.columns} does not split into blocks of {block[0]}x{block[1]}.'
        )
    return problems


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


def _describe(source: str, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    where = (
        f'layer "{location[1]}": {".".join(location[2:])}'
        if location[:1] == ["layers"] and len(location) > 1
        else ".".join(location)
    )
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], (dict, BaseModel)) else f" (given: {problem['input']!r})"
    return f"{source}: {where.rstrip(': ')}: {message}{given}."


def _flow(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
        .strip()
        .removesuffix("...")
        .strip()
    )


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: plain YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
