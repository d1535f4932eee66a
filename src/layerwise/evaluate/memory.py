"""Peak memory of a piece of work: resident memory of the process, and the accelerator's allocator."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Filled when the block ends. `rss` in bytes, of the whole process. `since_start`: the system could not reset its mark, so
    `rss` is the highest since the process began. `cuda`, `cuda_reserved`: None without CUDA."""

    rss: int = 0
    since_start: bool = False
    cuda: int | None = None
    cuda_reserved: int | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """`with peak_memory() as peak: ...`; then `peak.rss`. One at a time: marks are the process's own, nesting resets them."""
    result = PeakMemory(since_start=not _reset_mark())
    # asking must not wake a GPU that is not in use
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        yield result
    finally:
        result.rss = peak_rss()
        if cuda:
            torch.cuda.synchronize()
            result.cuda = torch.cuda.max_memory_allocated()
            result.cuda_reserved = torch.cuda.max_memory_reserved()


def peak_rss() -> int:
    """Highest resident memory of this process in bytes since it began, or since the last `peak_memory`."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: the call below knows the peak since the start
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
