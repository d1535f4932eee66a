"""Read a folder of packed weights: layer by layer as codes, or as the dense weights that stock readers make of them.

Needs no compressed-tensors. The dense weights are bit for bit those that transformers computes at its first forward.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from ..solvers.codes import Codes
from .pack_quantized import PARTS, Scheme, codes_of, weight_of
from .packed_config import is_packed, refuse_gone, schemes_in
from .places import read_config
from .weights import check_file, read_tensors, weight_files

WEIGHT = ".weight"


@dataclass(frozen=True)
class PackedFolder:
    """A folder whose config.json says pack-quantized. where: stored tensor -> its file."""

    folder: Path
    schemes: Mapping[str, Scheme]
    where: Mapping[str, Path]

    @property
    def weights(self) -> set[str]:
        """The names that the packed layers' weights have in the dense model."""
        return {layer + WEIGHT for layer in self.schemes}

    def belongs(self, name: str) -> str | None:
        """The packed layer that a stored tensor is part of; None for a tensor that stands for itself."""
        layer, _, part = name.rpartition(".")
        return layer if part in PARTS and layer in self.schemes else None

    def shape(self, layer: str) -> tuple[int, int]:
        """(rows, columns) of one layer."""
        name = f"{layer}.weight_shape"
        if name not in self.where:
            raise ModelError(f'{self.folder}: "{name}" is missing. Fetch the weights again.')
        with safe_open(self.where[name], framework="pt") as opened:
            rows, columns = opened.get_tensor(name).tolist()
        return rows, columns

    def codes(self, layer: str) -> Codes:
        """One layer's. Raises ModelError if the files contradict the config."""
        parts = {}
        for part in PARTS:
            if file := self.where.get(f"{layer}.{part}"):
                with safe_open(file, framework="pt") as opened:
                    parts[part] = opened.get_tensor(f"{layer}.{part}")
        return codes_of(parts, self.schemes[layer], f'{self.folder}: "{layer}"')

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The dense weight of this name in the model, such as "model.layers.0.mlp.up_proj.weight"."""
        return weight_of(self.codes(name.removesuffix(WEIGHT)), dtype)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the whole dense model, one by one."""
        for file in dict.fromkeys(self.where.values()):
            for name, tensor in read_tensors(file):
                if self.belongs(name) is None:
                    yield name, tensor
        for layer in self.schemes:
            yield layer + WEIGHT, self.weight(layer + WEIGHT, dtype)

    def files(self) -> dict[str, Path]:
        """Tensor of the dense model -> the file that has it; a packed one is where its codes are."""
        own = {name: file for name, file in self.where.items() if self.belongs(name) is None}
        return own | {layer + WEIGHT: self.where[f"{layer}.{PARTS[0]}"] for layer in self.schemes}


def packed_folder(folder: Path) -> PackedFolder | None:
    """The folder as packed weights; None if its config does not say so, or it has no config. Raises ModelError for a bad entry, or a sparse
    format of the past."""
    if not (folder / "config.json").is_file():
        return None
    refuse_gone(config := read_config(folder), folder)
    if not is_packed(config):
        return None
    where = {tensor.name: file for file in weight_files(folder) for tensor in check_file(file)}
    layers = [name.removesuffix(f".{PARTS[0]}") for name in where if name.endswith(f".{PARTS[0]}")]
    if ordered := [layer for layer in layers if f"{layer}.weight_g_idx" in where]:
        raise ModelError(f'{folder}: "{ordered[0]}" has its inputs in another order (weight_g_idx), which is not read.')
    return PackedFolder(folder, schemes_in(config, layers, folder), where)


def packed_codes(folder: Path) -> dict[str, Codes]:
    """Layer -> its codes, a byte a weight; none where the folder is not packed. Raises ModelError as of `packed_folder`."""
    packed = packed_folder(folder)
    return {} if packed is None else {layer: packed.codes(layer) for layer in packed.schemes}


def dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json gives the model; float32 where it gives none, as transformers has it."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32
