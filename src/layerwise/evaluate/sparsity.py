"""Zeros, counted from the tensors themselves: in memory, or in the safetensors files of a saved folder.

What a plan asked for is not what was saved until the file says so.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError, SelectionError

ROWS = 2**26  # weights read from a file at once


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
    zeros: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, pieces in _in_memory(source) if isinstance(source, nn.Module) else _saved(Path(source)):
        if names is not None and name not in names:
            continue
        for piece in pieces:
            if not piece.is_floating_point():  # packed integers: their zeros are codes, not weights
                break
            zeros[name] = zeros.get(name, 0) + _zeros(piece)
            shapes[name] = shape
    if names is not None and (absent := sorted(set(names) - shapes.keys())):
        raise SelectionError(
            f"{absent[0]}: no such floating-point tensor ({len(absent)} of {len(names)} names are not there)."
        )
    return ZeroCount(zeros, shapes, weight_bytes(source))


def weight_bytes(source: nn.Module | str | Path) -> int:
    """Bytes on disk of the safetensors files of a folder, or of one file; of a model in memory, of its parameters."""
    if isinstance(source, nn.Module):
        return sum(parameter.numel() * parameter.element_size() for parameter in source.parameters())
    return sum(file.stat().st_size for file in _files(Path(source)))


def _zeros(piece: Tensor) -> int:
    if piece.element_size() == 1:  # float8 types cannot be compared with a number
        piece = piece.float()
    return int((piece == 0).sum())


def _in_memory(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Iterator[Tensor]]]:
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape), iter([parameter.detach()])


def _saved(path: Path) -> Iterator[tuple[str, tuple[int, ...], Iterator[Tensor]]]:
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a mapping
                    shape = tuple(tensors.get_slice(name).get_shape())
                    yield name, shape, _pieces(tensors, name, shape)
        except SafetensorError as error:
            raise ModelError(
                f"{file}: not a readable safetensors file ({error}). Save or download it again."
            ) from error


def _pieces(tensors: safe_open, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor in pieces of whole rows: an embedding need not fit in memory at once."""
    if len(shape) < 2 or not all(shape):
        yield tensors.get_tensor(name)  # type: ignore[no-untyped-call]
        return
    view = tensors.get_slice(name)  # type: ignore[no-untyped-call]
    step = max(1, ROWS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield view[start : min(start + step, shape[0])]


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path}: no safetensors files here. Give a saved model's folder.")
    return files
