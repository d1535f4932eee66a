"""The protocol of one measured run, the same code on both sides of a comparison.

Nothing but torch and safetensors, so that it runs in a peer's environment too. A side gives two functions, one that loads the model
and one that compresses it; `run` times them and prints one line of JSON.
"""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Seconds = float


@dataclass(frozen=True)
class Job:
    """What one run does; goes to the process as JSON.

    model: a folder of weights. ids: a safetensors file with `input_ids` (samples, length). method: "wanda", "sparsegpt", optionally
    with a pattern, "sparsegpt-2:4"; or "gptq-4g64", bits and group. weights: where the new tensors are written.
    """

    model: str
    ids: str
    weights: str
    method: str
    sparsity: float
    batch: int
    threads: int
    propagate: str = "compressed"

    @property
    def solver(self) -> str:
        return self.method.partition("-")[0]

    @property
    def pattern(self) -> str | None:
        return self.method.partition("-")[2] or None

    @property
    def bits(self) -> tuple[int, int] | None:
        """(bits, group) of a quantizing method."""
        bits, _, group = (self.pattern or "").partition("g")
        return (int(bits), int(group)) if group else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(
    load: Callable[[Path], nn.Module],
    compress: Callable[[nn.Module, list[Tensor], Job], dict[str, Any]],
    versions: dict[str, str],
) -> None:
    """Load, time plain forwards, compress, write the weights; prints the measurements as the last line of standard output.

    `compress` gets the batches as (batch, length) tensors and may return figures of its own. The plain forwards come first: they
    are the unit of time, and they warm up the thread pool and kernels for both sides alike.
    """
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    ids = load_file(job.ids)["input_ids"]
    batches = [one.contiguous() for one in ids.split(job.batch)]
    model = load(Path(job.model)).eval()
    forward, body = (forward_seconds(part, batches) for part in (model, model.base_model))
    before = settle()
    started = time.perf_counter()
    own = compress(model, batches, job)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    write_weights(model, Path(job.weights))
    measured = {
        "seconds": seconds,
        "forward_seconds": forward,
        "body_seconds": body,
        "peak_bytes": peak,
        "grown_bytes": peak - before,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "own": own,
    }
    print(json.dumps(measured))


@torch.no_grad()
def forward_seconds(model: nn.Module, batches: list[Tensor]) -> Seconds:
    """One pass of all batches, after one warm-up batch, cache off."""
    model(input_ids=batches[0], use_cache=False)
    started = time.perf_counter()
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def settle() -> int:
    """Give freed memory back, start a new peak, and return the resident bytes now."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory is measured through /proc: run this on Linux.")
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size to the current one
    return memory("VmRSS")


def memory(field: str) -> int:
    """Bytes in one field of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def write_weights(model: nn.Module, path: Path) -> None:
    """Every parameter under its name, tied ones once; what a quantizer keeps beside a weight (scales, zeros) is left out."""
    beside = ("_scale", "_zero_point", "_g_idx")
    tensors = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if not name.endswith(beside)
    }
    save_file(tensors, path)


def machine(device: str = "cpu") -> str:
    """The processor, its cores and the system's memory, in one line; an accelerator first, where the work is on one."""
    cpu = Path("/proc/cpuinfo")
    information = cpu.read_text().splitlines() if cpu.exists() else [f"model name: {platform.processor()}"]
    model = next((line.partition(":")[2].strip() for line in information if line.startswith("model name")), "unknown")
    flags = next((line for line in information if line.startswith("flags")), "").split()
    widest = next((name for name in ("avx512f", "avx2", "avx") if name in flags), platform.machine())
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    return f"{accelerator}{model} ({widest}), {os.cpu_count()} cores, {memory_gb:.0f} GiB, {platform.system()}"
