"""A Llama-2-7B-shaped model pruned and quantized on one accelerator: seconds, where they go, peak memory, what 2:4 buys in one layer.

    python benchmarks/scale_gpu.py --out benchmarks/results/scale_gpu.md
    python benchmarks/scale_gpu.py --toy            # the same code on a toy, on any machine

Weights and tokens are random: speed and memory do not depend on them, quality is not judged here. The model is built on the device in
bfloat16, so nothing is downloaded or copied.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

import layerwise as lw
from layerwise.plan import Prune
from measuring import machine

GOALS = {"wanda": 30.0, "sparsegpt": 120.0, "gptq-4": 180.0}  # seconds, full size
SOLVERS = {"wanda": lw.solvers.Wanda, "sparsegpt": lw.solvers.SparseGPT, "gptq": lw.solvers.GPTQ}


@dataclass(frozen=True)
class Size:
    """A model's shape and the calibration that goes through it; the defaults are Llama-2-7B and the papers' 128 x 2048."""

    hidden: int = 4096
    intermediate: int = 11008
    blocks: int = 32
    heads: int = 32
    vocabulary: int = 32000
    samples: int = 128
    length: int = 2048
    batch: int = 4
    rows: tuple[int, ...] = (1, 16, 4096)  # inputs of the one 2:4 layer


TOY = Size(hidden=128, intermediate=256, blocks=2, heads=4, vocabulary=512, samples=8, length=64, rows=(1, 16, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy size, on the CPU where there is no CUDA")
    parser.add_argument("--methods", default="wanda,sparsegpt,sparsegpt-2:4,gptq-4")
    parser.add_argument("--batch", type=int, help="samples in one forward pass (default: 4)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("scale_gpu: no CUDA device, and the full size needs one; --toy runs the same code on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = TOY if options.toy else Size()
    size = Size(**{**size.__dict__, "batch": options.batch or size.batch})
    lines = [*report(size, device, options.methods.split(","))]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(size: Size, device: torch.device, methods: list[str]) -> Iterator[str]:
    """Print each line as it is known, and pass it on."""
    for line in _report(size, device, methods):
        print(line, flush=True)
        yield line


def _report(size: Size, device: torch.device, methods: list[str]) -> Iterator[str]:
    yield from [
        "# Pruning and quantizing a 7B-shaped model on one accelerator" if size.blocks == 32 else "# The toy: no claim",
        "",
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"Machine: {name}; {machine()}. torch {torch.__version__}, layerwise {lw.__version__}."
    yield (
        f"Protocol: random bfloat16 weights, {size.blocks} blocks of {size.hidden}/{size.intermediate};"
        f" {size.samples} x {size.length} random tokens in batches of {size.batch};"
        " sparsity 50 %, or 4 bits in groups of 128; one run after one warm-up block."
    )
    yield ""
    ids = torch.randint(size.vocabulary, (size.samples, size.length), generator=torch.Generator().manual_seed(0))
    warm_up(size, device, ids)
    yield "| method | seconds | goal | collect s | solve s | propagate s | plain forward s | model GB | peak GB | zeros |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for method in methods:
        yield _line(method, pruned(size, device, ids, method), size)
    yield from ["", *two_of_four(size, device)]


def warm_up(size: Size, device: torch.device, ids: Tensor) -> None:
    """One block with every solver: kernels are loaded and libraries initialised once, which is not what is measured."""
    one = Size(**{**size.__dict__, "blocks": 1, "samples": size.batch})
    for method in ("wanda", "sparsegpt", "gptq-4"):
        pruned(one, device, ids[: size.batch], method)


def build(size: Size, device: torch.device) -> nn.Module:
    """Blocks are made on the device one after another, in bfloat16 from the start: the peak is the model itself."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=max(4096, size.length),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def pruned(size: Size, device: torch.device, ids: Tensor, method: str) -> dict[str, Any]:
    """Build, prune and measure once; the model is gone afterwards."""
    solver, _, pattern = method.partition("-")
    model = build(size, device)
    data = lw.Batches(
        tuple({"input_ids": part} for part in ids.split(size.batch)), {"source": "random tokens", "seed": 0}
    )
    plan = plan_of(model, solver, pattern)
    forward = timed(device, lambda: forwards(model, data))
    held = memory(device, peak=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result: list[lw.Result] = []
    seconds = timed(device, lambda: result.append(lw.compress(model, plan, solver=SOLVERS[solver](), data=data)))
    return {
        "seconds": seconds,
        "split": result[0].seconds,
        "forward": forward,
        "held": held,
        "peak": memory(device, peak=True),
        "zeros": result[0].sparsity,
    }


def plan_of(model: nn.Module, solver: str, pattern: str) -> lw.Plan:
    """Half the weights of every layer, or all in so many bits, in groups of 128."""
    if solver == "gptq":
        return lw.methods.UniformBits(bits=int(pattern), group=128).plan(model)
    return lw.methods.Uniform(sparsity=0.5, pattern=pattern or "unstructured").plan(model)


@torch.no_grad()
def forwards(model: nn.Module, data: lw.Batches) -> None:
    """Every batch through the blocks, head left out, as the walk does."""
    for batch in data:
        model.base_model(batch["input_ids"].to(next(model.parameters()).device), use_cache=False)


def timed(device: torch.device, work: Any) -> float:
    """Seconds until the device has really finished."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device, *, peak: bool) -> float | None:
    """GB held by tensors on the device, or their peak; None on the CPU, where the allocator does not count."""
    if device.type != "cuda":
        return None
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 1e9


@torch.no_grad()
def two_of_four(size: Size, device: torch.device) -> Iterator[str]:
    """One linear of the MLP, 2:4 by magnitude, by torch's semi-structured kernels against the dense one."""
    yield f"One 2:4 layer, {size.hidden} inputs, {size.intermediate} outputs, bfloat16, median of repeated calls:"
    yield ""
    if device.type != "cuda":
        yield "not measured: torch's semi-structured kernels need CUDA."
        return
    from torch.sparse import to_sparse_semi_structured

    weight = torch.randn(size.intermediate, size.hidden, generator=torch.Generator().manual_seed(0))
    solved = lw.solvers.Magnitude().solve(
        [weight], None, [Prune(sparsity=0.5, pattern="2:4")], [torch.Generator().manual_seed(0)]
    )[0]
    dense = solved.weight.to(device, torch.bfloat16)
    sparse = to_sparse_semi_structured(dense)
    yield "| rows | dense µs | 2:4 µs | times faster | largest difference |"
    yield "|--:|--:|--:|--:|--:|"
    for rows in size.rows:
        inputs = torch.randn(rows, size.hidden, device=device, dtype=torch.bfloat16)
        usual, faster = (microseconds(inputs, one) for one in (dense, sparse))
        difference = (linear(inputs, dense) - linear(inputs, sparse)).abs().max().item()
        yield f"| {rows} | {usual:.1f} | {faster:.1f} | {usual / faster:.2f} | {difference:.3g} |"


def microseconds(inputs: Tensor, weight: Tensor) -> float:
    timer = Timer("linear(inputs, weight)", globals={"linear": linear, "inputs": inputs, "weight": weight})
    return timer.blocked_autorange(min_run_time=1.0).median * 1e6


def _line(method: str, found: dict[str, Any], size: Size) -> str:
    goal = GOALS[method] if method in GOALS and size.blocks == 32 else None
    gigabytes = ["-" if found[key] is None else f"{found[key]:.2f}" for key in ("held", "peak")]
    split = [f"{found['split'][part]:.2f}" for part in ("collect", "solve", "propagate")]
    cells = [
        method,
        f"{found['seconds']:.2f}",
        "-" if goal is None else f"{goal:.0f}",
        *split,
        f"{found['forward']:.2f}",
    ]
    return f"| {' | '.join([*cells, *gigabytes])} | {found['zeros']:.4%} |"


if __name__ == "__main__":
    main()
