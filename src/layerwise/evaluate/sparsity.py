"""Zeros, counted from the tensors themselves: in memory, or in the safetensors files of a saved folder.

What a plan asked for is not what was saved until the file says so.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from ..errors import SelectionError
from ..io import zeros as saved


@dataclass(frozen=True)
class ZeroCount:
    """Name -> zeros and shape of every floating-point tensor counted (-0.0 is a zero). bytes: of the weight files, or in memory."""

    zeros: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    bytes: int

    @property
    def per_layer(self) -> dict[str, float]:
        """Sparsity of every weight with two or more dimensions, in [0, 1]; vectors (norms, biases) are not layers."""
        return {name: self.zeros[name] / math.prod(shape) for name, shape in self.shapes.items() if len(shape) > 1}

    @property
    def total(self) -> float:
        """Sparsity over all counted tensors together, in [0, 1]."""
        return sum(self.zeros.values()) / max(1, sum(math.prod(shape) for shape in self.shapes.values()))

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "total": self.total}


def count_zeros(source: nn.Module | str | Path, names: Collection[str] | None = None) -> ZeroCount:
    """Zeros per tensor of a model or of a saved folder (or one safetensors file).

    names: the parameters to count; None counts every floating-point tensor. Tied parameters of a model count once.
    Raises ModelError for a folder without readable safetensors, SelectionError for a name that is not there.
    """
    counts = _in_memory(source) if isinstance(source, nn.Module) else saved.count_zeros(Path(source))
    if names is not None:
        if absent := sorted(set(names) - counts.keys()):
            raise SelectionError(
                f"{absent[0]}: no such floating-point tensor ({len(absent)} of {len(names)} names are not there)."
            )
        counts = {name: count for name, count in counts.items() if name in names}
    zeros = {name: count for name, (count, _) in counts.items()}
    return ZeroCount(zeros, {name: shape for name, (_, shape) in counts.items()}, weight_bytes(source))


def weight_bytes(source: nn.Module | str | Path) -> int:
    """Bytes on disk of the safetensors files of a folder, or of one file; of a model in memory, of its parameters."""
    if isinstance(source, nn.Module):
        return sum(parameter.numel() * parameter.element_size() for parameter in source.parameters())
    return sum(file.stat().st_size for file in saved.files_of(Path(source)))


def _in_memory(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {
        name: (saved.zeros_in(parameter.detach()), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
