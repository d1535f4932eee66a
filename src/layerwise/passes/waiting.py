"""What paused passes take up while they wait, known as soon as the first of them stands at its first block."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError
from ..tasks.batches import Batch
from .paused import PausedPasses, tensors_of

_MEMORY, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Waiting:
    """An estimate for all passes of this process together. It is of the blocks that the first batch meets first: a second stack of wider
    or longer inputs (the text behind an image) takes more.

    bytes: the block's inputs for all batches, its outputs beside them, and the first block's inputs, which many models hold on to.
    longest: tokens of the longest sample; None where batches have no token ids. place: where they wait, "cpu", "cuda:0" or the spill
    folder (then files is true). available: bytes that are free there; None where the system does not say.
    """

    bytes: int
    longest: int | None
    place: str
    available: int | None
    files: bool = False

    @property
    def fits(self) -> bool:
        """False only where it is known not to."""
        return self.available is None or self.bytes <= self.available


def waiting_of(passes: PausedPasses) -> Waiting:
    """The estimate, before all batches but the first have started. Raises ConfigError where passes should wait in files and do not."""
    first, batches = passes.first(), passes.batches
    tensors = tensors_of(first.arguments)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    state = next((one.nbytes for one in tensors if one.is_floating_point()), 0)
    held = sum(storages.values()) + 2 * state  # of every input once: the first block's, and this one's; the output
    sizes = [_entries(batch) for batch in batches]
    total = round(held * sum(sizes) / sizes[0])
    words = [batch["input_ids"].shape[-1] for batch in batches if "input_ids" in batch]
    device = tensors[0].device if tensors else torch.device("cpu")
    if passes.spill is None:
        return Waiting(total, max(words, default=None), str(device), available_memory(device))
    if device.type != "cpu":
        raise ConfigError(
            f"spill: activations wait on {device}, where the model is, and only those in host memory can go to files. Keep the"
            " model on the CPU and name the device for its blocks: Settings(device=...)."
        )
    folder = passes.spill.folder.parent
    return Waiting(total, max(words, default=None), str(folder), shutil.disk_usage(folder).free, files=True)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU, or on the machine (of its container, where that has less); None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def _entries(batch: Batch) -> int:
    """How large a batch is beside others of its kind: token ids, pixels; the activations grow with them."""
    return max(next(iter(batch.values())).numel(), 1)


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
