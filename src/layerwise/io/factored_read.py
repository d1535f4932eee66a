"""Read a folder of linears in factors: layer by layer as factors, or as the dense weights that they multiply out to.

`layerwise.json` names the layers and their patterns. The weight files have names of their own (factored*.safetensors), so that a stock
loader says that it finds no weights, instead of filling the layers with random numbers.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError, ShapeError
from ..solvers.factors import PARTS, Factors
from .armor_linear import is_turned
from .weights import StoredTensor, check_file, read_tensors, weight_files

WEIGHT = ".weight"
RECORD, ENTRY, FORMAT = "layerwise.json", "factors", 1
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredFolder:
    """patterns: layer -> (n, m). where: stored tensor -> its file. turned: layers that the model has as `Conv1D`, (inputs, outputs).

    products: whether `tensors` multiplies out or only keeps the place.
    """

    folder: Path
    patterns: Mapping[str, tuple[int, int]]
    where: Mapping[str, Path]
    turned: frozenset[str] = frozenset()
    products: bool = True

    @property
    def weights(self) -> set[str]:
        """The names that the layers' weights have in the dense model."""
        return {layer + WEIGHT for layer in self.patterns}

    def belongs(self, name: str) -> str | None:
        """The layer that a stored tensor is a factor of; None for a tensor that stands for itself."""
        layer, _, part = name.rpartition(".")
        return layer if part in PARTS and layer in self.patterns else None

    def factors(self, layer: str) -> Factors:
        """One layer's, as stored. Raises ModelError if the files contradict layerwise.json."""
        parts = {}
        for part in PARTS:
            name = f"{layer}.{part}"
            with safe_open(self.where[name], framework="pt") as opened:
                parts[part] = opened.get_tensor(name)
        try:
            found = Factors(**parts, n=self.patterns[layer][0], m=self.patterns[layer][1])
        except ShapeError as error:
            raise ModelError(f'{self.folder}: "{layer}": {error}') from error
        if wrong := int((found.keep.view(-1, found.m).sum(1) != found.n).sum()):
            raise ModelError(
                f'{self.folder}: "{layer}" marks other than {found.n} entries as kept in {wrong} groups of {found.m}.'
                " Fetch the weights again."
            )
        return found

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The dense weight of this name in the model, such as "model.layers.0.mlp.up_proj.weight", as the model has it."""
        layer = name.removesuffix(WEIGHT)
        factors = self.factors(layer)
        weight = factors.weight().to(dtype) if self.products else torch.zeros(1, dtype=dtype).expand(factors.shape)
        return weight.T if layer in self.turned else weight

    def check_turned(self, model: nn.Module) -> None:
        """Raise ModelError if the dense model stores a layer the other way than layerwise.json says: a square one would load wrong."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for layer in self.patterns:
            if layer in modules and is_turned(modules[layer]) != (layer in self.turned):
                raise ModelError(
                    f'{self.folder}: {RECORD} says of "{layer}" that its weight is {"" if layer in self.turned else "not "}turned,'
                    f" and the model has a {type(modules[layer]).__name__}. Fetch it again."
                )

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the whole dense model, one by one."""
        for file in dict.fromkeys(self.where.values()):
            for name, tensor in read_tensors(file):
                if self.belongs(name) is None:
                    yield name, tensor
        for layer in self.patterns:
            yield layer + WEIGHT, self.weight(layer + WEIGHT, dtype)

    def files(self) -> dict[str, Path]:
        """Tensor of the dense model -> the file that has it; that of a layer in factors is where its first factor is."""
        own = {name: file for name, file in self.where.items() if self.belongs(name) is None}
        return own | {layer + WEIGHT: self.where[f"{layer}.{PARTS[0]}"] for layer in self.patterns}


def factored_folder(folder: Path) -> FactoredFolder | None:
    """The folder as one of factors; None if its layerwise.json names none. Raises ModelError for a record that cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8")).get(ENTRY)
        if not entry:
            return None
        if entry["format"] != FORMAT:
            raise ModelError(
                f"{path}: factors in format {entry['format']}; this layerwise reads {FORMAT}. A newer one may read it."
            )
        patterns = {str(name): _pattern(str(text)) for name, text in entry["layers"].items()}
        turned = frozenset(entry.get("turned", []))
        if strange := turned - set(patterns):
            raise ValueError(f"{min(strange, key=str)!r} is turned and no layer of it")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: its entry of factors cannot be read ({error}). Fetch it again.") from error
    stored = {tensor.name: (tensor, file) for file in weight_files(folder) for tensor in check_file(file)}
    for layer in patterns:
        _check_parts(folder, layer, {name: tensor for name, (tensor, _) in stored.items()})
    return FactoredFolder(folder, patterns, {name: file for name, (_, file) in stored.items()}, turned)


def _pattern(text: str) -> tuple[int, int]:
    n, m = (int(number) for number in text.split(":"))
    if not 0 < n <= m:
        raise ValueError(f'pattern "{text}" is not n of m with 0 < n <= m')
    return n, m


def _check_parts(folder: Path, layer: str, stored: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError unless the headers have all four, in dtypes and dimensions that factors can have."""
    if missing := [name for part in PARTS if (name := f"{layer}.{part}") not in stored]:
        raise ModelError(f'{folder}: "{missing[0]}" is missing. Fetch the weights again.')
    parts = {part: stored[f"{layer}.{part}"] for part in PARTS}
    for part, tensor in parts.items():
        kinds = ("U8",) if part == "bits" else FLOATING
        dimensions = 3 if part in ("left", "right") else 2
        if tensor.type not in kinds or len(tensor.shape) != dimensions or not tensor.size:
            raise ModelError(
                f'{folder}: "{tensor.name}" is {tensor.type} of shape {list(tensor.shape)}; factors have {dimensions} dimensions there,'
                f" of {' or '.join(kinds)}. Fetch the weights again."
            )
    if len(types := {tensor.type for part, tensor in parts.items() if part != "bits"}) > 1:
        raise ModelError(
            f'{folder}: factors of "{layer}" differ in dtype ({", ".join(sorted(types))}). Fetch them again.'
        )


@dataclass(frozen=True)
class FactoredReport:
    """layers: how many are in factors. bytes: of all that stands for them. weights: how many that is."""

    layers: int
    bytes: int
    weights: int
    patterns: tuple[str, ...]

    @property
    def bits(self) -> float:
        """True bits per weight: kept values, their positions and both factors, as stored."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layers": self.layers,
            "bytes": self.bytes,
            "weights": self.weights,
            "bits": self.bits,
            "patterns": [*self.patterns],
        }

    def lines(self) -> list[str]:
        """What is in factors, and who can load it."""
        return [
            f"In factors (ARMOR, cores {' and '.join(self.patterns)}): {self.layers} layers, {self.bits:.3f} bits per weight of these"
            " layers, positions and both factors counted.",
            "Loads with layerwise.load alone; dense=True there, or --dense when it is made, multiplies the factors out for any"
            " tool, in the size of the dense model. 2:4 cores run by sparse kernels on NVIDIA GPUs from Ampere on, in 16 bits; elsewhere"
            " nothing is faster.",
        ]


def factored_report(folder: Path) -> FactoredReport | None:
    """Of a folder; None if nothing in it is in factors."""
    found = factored_folder(folder)
    if found is None:
        return None
    stored = {tensor.name: tensor for file in set(found.where.values()) for tensor in check_file(file)}
    size = sum(tensor.bytes for name, tensor in stored.items() if found.belongs(name))
    shapes = {part: {layer: stored[f"{layer}.{part}"].shape for layer in found.patterns} for part in ("left", "right")}
    weights = sum(
        shapes["left"][layer][0] * shapes["left"][layer][1] * shapes["right"][layer][0] * shapes["right"][layer][1]
        for layer in found.patterns
    )
    patterns = tuple(sorted({f"{n}:{m}" for n, m in found.patterns.values()}))
    return FactoredReport(len(found.patterns), size, weights, patterns)
