"""Tensors of waiting passes in files: memory-mapped in place, so that the system can take their memory whenever it needs it.

Whoever holds such a tensor goes on holding it and finds the same numbers: its bytes lie in a mapped file instead of the heap. A file loses
its name as soon as it is mapped, so nothing is left behind, not even by a killed process; its room is free again when the tensor is.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import OutputError, SaveError

LEAST = 1 << 16  # bytes; what is smaller costs more as a file than it frees


class Spill:
    """Puts tensors into files of `folder`, which has nothing else in it."""

    def __init__(self, folder: Path, least: int = LEAST) -> None:
        self.folder, self.least, self._numbers = folder, least, count()

    def keep(self, tree: Any) -> None:
        """Map every large tensor of this tree that lies in host memory. Raises SaveError if the disk is full."""
        tree_map_only(Tensor, self._keep, tree)

    def _keep(self, tensor: Tensor) -> None:
        # a layout other than the plain one is part of what kernels see: such tensors stay
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()
        if not plain or tensor.nbytes < max(self.least, 1) or tensor.untyped_storage().filename is not None:
            return
        path = self.folder / str(next(self._numbers))
        try:  # written, not copied into the mapping: there a full disk would be a bus error
            tensor.detach().flatten().view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise SaveError(
                f"{self.folder.parent}: cannot put {tensor.nbytes} bytes of waiting activations there: {error.strerror}."
                " Give a folder with more room (--spill)."
            ) from error
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        tensor.data = mapped.view(tensor.shape)
        with suppress(PermissionError):  # Windows keeps the names of mapped files; they go with the folder
            path.unlink()


@contextmanager
def spilling(model: nn.Module, folder: str | Path | None) -> Iterator[None]:
    """Within, passes through this model wait with their tensors in files of `folder` (None: in memory). Raises OutputError."""
    if folder is None:
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="layerwise-spill-", dir=folder))
    except OSError as error:
        raise OutputError(f'spill folder "{folder}" cannot be made: {error.strerror}. Give one elsewhere.') from error
    before = spill_of(model)
    model.layerwise_spill = Spill(own)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.layerwise_spill
        if before is not None:
            model.layerwise_spill = before  # type: ignore[assignment]
        shutil.rmtree(own, ignore_errors=True)


def spill_of(model: nn.Module) -> Spill | None:
    """Where passes through this model wait; None: in memory."""
    spill: Spill | None = getattr(model, "layerwise_spill", None)
    return spill
