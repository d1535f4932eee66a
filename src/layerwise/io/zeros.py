"""Zeros, counted in the safetensors files of a saved model: what a plan asked for is not what was saved until the file says so."""

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .packed_read import packed_folder
from .weights import check_file, weight_files

_FLOATING = ("F64", "F32", "F16", "BF16", "F8")  # safetensors' words; F4 and F6 are packed codes
ROWS = 2**26  # weights read from a file at once


def count_zeros(source: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Tensor name -> (zeros, shape) of every floating-point tensor in the files of a folder, or in one file.

    A layer in packed codes counts as the weight that they stand for; other integers are left out. Raises ModelError for files that are
    missing or damaged.
    """
    counts = {}
    packed = packed_folder(source)
    for path in files_of(source):
        floating = [tensor for tensor in check_file(path) if tensor.type.startswith(_FLOATING)]
        floating = [tensor for tensor in floating if packed is None or packed.belongs(tensor.name) is None]
        with safe_open(path, framework="pt") as file:
            for tensor in floating:
                zeros = sum(zeros_in(piece) for piece in _pieces(file, tensor.name, tensor.shape))
                counts[tensor.name] = zeros, tensor.shape
    if packed is not None:
        for layer in packed.schemes:
            counts[f"{layer}.weight"] = zeros_in(packed.codes(layer).weight()), packed.shape(layer)
    return counts


def files_of(source: Path) -> list[Path]:
    """The weight files of a folder (`weight_files`), or the one file given."""
    return [source] if source.is_file() else weight_files(source)


def zeros_in(tensor: Tensor) -> int:
    """How many values are zero; -0.0 is."""
    if tensor.element_size() == 1:  # float8 types cannot be compared with a number
        tensor = tensor.float()
    return int((tensor == 0).sum())


def _pieces(file: safe_open, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor in pieces of whole rows: an embedding need not fit in memory at once."""
    if len(shape) < 2 or not all(shape):
        yield file.get_tensor(name)  # type: ignore[no-untyped-call]
        return
    view = file.get_slice(name)  # type: ignore[no-untyped-call]
    step = max(1, ROWS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield view[start : min(start + step, shape[0])]
