"""The safetensors files of a model folder: found, checked, and read without building the model.

A file is checked by its header alone, so a truncated download is named in milliseconds, before any work.
Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes without gaps.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import ModelError

_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # the other types end in their number of bits: F32, BF16, I64
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header describes it. `type` is safetensors' word: F32, BF16, I32 …"""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, in the order of their names; shards named by the index where there is one.

    Raises ModelError if there are none, if the index is unreadable, or if it names a file that is not there.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder. Give a saved model's folder.")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = _shard_names(index)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files that {index.name} names are missing"
                f" ({_first(missing)}). Fetch them again."
            )
        return [folder / name for name in names]
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    if files := sorted(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: weights are named {_first([f.name for f in files])}. Name the file model.safetensors, or add the index"
            " model.safetensors.index.json that says which tensor is in which file."
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder}: it has only pickled weights ({_first(pickled)}), and a pickle can run any code when it is loaded."
            " Convert them with safetensors.torch.save_file on a machine that trusts them."
        )
    raise ModelError(f"{folder}: no weights in it. Put model.safetensors (or its shards and their index) there.")


def check_file(path: Path) -> list[StoredTensor]:
    """What the header says is in this file. Raises ModelError naming the file if it is truncated or corrupt."""
    size = path.stat().st_size
    refetch = "Fetch or write the file again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path}: truncated or not safetensors: {size} bytes, header of {length}. {refetch}")
        try:
            header = json.loads(file.read(length))
            tensors = [
                StoredTensor(
                    name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            offsets = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{path}: corrupt: its header is not what safetensors writes ({error}). {refetch}"
            ) from error
    expected = 8 + length + (offsets[-1][1] if offsets else 0)
    if size != expected:
        raise ModelError(
            f"{path}: {'truncated' if size < expected else 'corrupt'}: {size} of {expected} bytes. {refetch}"
        )
    starts = [0, *(end for _, end in offsets)]
    if any(start != begin for start, (begin, _) in zip(starts, offsets, strict=False)):
        raise ModelError(f"{path}: corrupt: its tensors overlap or leave gaps. {refetch}")
    for tensor in tensors:
        bits = _bits(tensor.type)
        if bits is not None and tensor.size * bits != tensor.bytes * 8:
            raise ModelError(
                f'{path}: corrupt: "{tensor.name}" of shape {list(tensor.shape)} {tensor.type} has {tensor.bytes} bytes. {refetch}'
            )
    return tensors


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) one by one; only one is in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            yield name, file.get_tensor(name)


def _bits(kind: str) -> int | None:
    if kind in _BITS:
        return _BITS[kind]
    digits = "".join(c if c.isdigit() else " " for c in kind).split()  # F32, BF16, and F8_E4M3: the first number
    return int(digits[0]) if digits else None


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of safetensors files ({error}). Fetch it again.") from error
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ModelError(f"{index}: it names {bad[0]!r}, which is not a file of this folder.")
    if not names:
        raise ModelError(f"{index}: it names no files. Fetch it again.")
    return names


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
