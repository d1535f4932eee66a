"""Tensors of waiting passes in files: memory-mapped in place, so that the system can take their memory whenever it needs it.

Whoever holds such a tensor goes on holding it and finds the same numbers: its bytes lie in a mapped file instead of the heap. In place,
because the model's own code holds on to what it hands to a block. A file loses its name as soon as it is mapped, so nothing is left
behind, not even by a killed process; its room is free again when the tensor is.
"""

import ctypes
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import OutputError, SaveError

LEAST = 1 << 16  # bytes; what is smaller costs more as a file than it frees


class Spill:
    """Puts tensors into files of `folder`, which has nothing else in it."""

    def __init__(self, folder: Path, least: int) -> None:
        self.folder, self.least, self._mapped = folder, max(least, 1), 0
        self._others: dict[int, Tensor] = {}

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """These are somebody's own (calibration data, buffers of the model): they stay where they are."""
        self._others = {id(one): one for one in tensors}  # held, so that an id stays its own

    def keep(self, tree: Any) -> None:
        """Map every large tensor of this tree that lies in host memory. Raises SaveError if the disk is full."""
        before = self._mapped
        tree_map_only(Tensor, self._keep, tree)
        if self._mapped != before:
            _trim()

    def _keep(self, tensor: Tensor) -> None:
        if type(tensor) is not Tensor or id(tensor) in self._others or tensor.device.type != "cpu":
            return  # a Parameter, say
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.nbytes < self.least:
            return
        by_memory = tensor.detach().permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        if not by_memory.is_contiguous() or tensor.untyped_storage().filename is not None:
            return  # part of something larger or an expanded view; or in a file already
        path = self.folder / str(self._mapped)
        try:  # written, not copied into the mapping: there a full disk would be a bus error
            by_memory.flatten().view(torch.uint8).numpy().tofile(path)
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:  # torch's, where a process may have no more mappings
            path.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise SaveError(
                f"{self.folder.parent}: cannot put {tensor.nbytes} bytes of waiting activations there: {reason.rstrip('.')}."
                " Give a folder with more room (--spill), or larger batches if there are too many files (--batch)."
            ) from error
        self._mapped += 1
        tensor.data = mapped.as_strided(tensor.shape, tensor.stride())  # kernels see the same layout
        with suppress(PermissionError):  # Windows keeps the names of mapped files; they go with the folder
            path.unlink()


def _trim() -> None:
    """Have the allocator give freed memory back. glibc keeps holes of up to 32 MB for itself, and small objects that land in their rims
    keep it from using them again: without this the memory of tensors that went to files stays with the process."""
    # other systems have no such call, and give large pieces back by themselves
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def spilling(model: nn.Module, folder: str | Path | None) -> Iterator[None]:
    """Within, passes through this model wait with their tensors in files of `folder` (None: as they did). Raises OutputError.

    The folder and its parents are made, and those that were made are gone afterwards, with everything in them that is ours.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="layerwise-spill-", dir=folder))
    except OSError as error:
        raise OutputError(f'spill folder "{folder}" cannot be made: {error.strerror}. Give one elsewhere.') from error
    before = spill_of(model)
    model.layerwise_spill = Spill(own, LEAST)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.layerwise_spill
        if before is not None:
            model.layerwise_spill = before  # type: ignore[assignment]
        shutil.rmtree(own, ignore_errors=True)
        for one in made:  # the innermost first
            with suppress(OSError):  # something else is in it
                one.rmdir()


def spill_of(model: nn.Module) -> Spill | None:
    """Where passes through this model wait; None: in memory."""
    spill: Spill | None = getattr(model, "layerwise_spill", None)
    return spill
