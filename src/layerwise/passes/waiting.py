"""What paused passes hold in memory while they wait, known before they are made."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..tasks.batches import Batch, call
from .paused import Forward, PausedPasses, tensors_of

_MEMORY, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Waiting:
    """An estimate for all passes together, good to a third or so.

    bytes: inputs of a block for all batches, its outputs beside them, and the first block's inputs, which many models keep to the end.
    longest: tokens of the longest sample; None where batches have no token ids. device: where they wait ("cpu", "cuda:0").
    available: bytes that are free there; None where the system does not say.
    """

    bytes: int
    longest: int | None
    device: str
    available: int | None

    @property
    def fits(self) -> bool:
        """False only where it is known not to."""
        return self.available is None or self.bytes <= self.available


def waiting_of(model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], forward: Forward = call) -> Waiting:
    """The estimate, from one pass that is taken to its first block and abandoned there. Errors as of `PausedPasses`."""
    held, device = 0, torch.device("cpu")
    with PausedPasses(model, blocks, batches[:1], forward) as passes:
        for _, standing in passes:
            tensors = tensors_of(standing[0].arguments)
            storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
            state = next((one for one in tensors if one.is_floating_point()), None)
            held = sum(storages.values()) + (0 if state is None else 2 * state.nbytes)
            device = tensors[0].device if tensors else device
            break
    sizes = [next(iter(batch.values())).numel() for batch in batches]
    words = [batch["input_ids"].shape[-1] for batch in batches if "input_ids" in batch]
    total = round(held * sum(sizes) / sizes[0]) if sizes and sizes[0] else 0
    return Waiting(total, max(words, default=None), str(device), available_memory(device))


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU, or on the machine (of its container, where that has less); None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # Windows, macOS


def _of_container() -> int | None:
    """Of a control group (version 2): its limit less what it uses; pages of files that nobody maps can be dropped."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
        facts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - int((_GROUP / "memory.current").read_text()) + int(facts["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None  # no such group, or no limit ("max")
