"""Fine-tuning a 7B-shaped model on one accelerator: peak memory and seconds of a step, for OwLore and what it is compared with.

    python benchmarks/training_gpu.py --out benchmarks/results/training_gpu.md
    python benchmarks/training_gpu.py --toy            # the same code on a toy, on any machine; no memory of the CPU is counted

Llama-2-7B's shape with random bfloat16 weights and tokens: memory and speed do not depend on them, quality is `owlore.py`'s. Every method
is trained for two periods, so that blocks have been exchanged once; the peak is the most that torch had allocated from the first step on.
OwLore is the published setting: five blocks, rank 256, moments in float32.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import layerwise as lw
from layerwise.recover import LayerSampling, LowRank, LowRankAdam, parameter_groups
from measuring import machine
from scale_gpu import build, synchronize

PUBLISHED = 21.0  # GB, the paper's figure for a 7B model


@dataclass(frozen=True)
class Size:
    """The model's shape, and what a step sees."""

    hidden: int = 4096
    intermediate: int = 11008
    blocks: int = 32
    heads: int = 32
    vocabulary: int = 32000
    batch: int = 1
    length: int = 512
    period: int = 3
    rank: int = 256


TOY = Size(hidden=64, intermediate=128, blocks=6, heads=2, vocabulary=256, length=32, rank=8)
Prepared = tuple[nn.Module, Optimizer, Callable[[int], None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy size, on the CPU where there is no CUDA")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--length", type=int, help="tokens of a step (default: 512)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit(
            "training_gpu: no CUDA device, and the full size needs one; --toy runs the same code on the CPU."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = TOY if options.toy else Size()
    size = Size(**{**size.__dict__, "length": options.length or size.length})
    lines = []
    for line in report(size, device, options.methods.split(";")):
        print(line, flush=True)
        lines.append(line)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(size: Size, device: torch.device, names: list[str]) -> Iterator[str]:
    yield from [
        "# Fine-tuning a 7B-shaped model on one accelerator" if size.blocks == 32 else "# The toy: no claim",
        "",
    ]
    yield f"Machine: {machine(device.type)}. torch {torch.__version__}, layerwise {lw.__version__}."
    yield (
        f"Protocol: random bfloat16 weights, {size.blocks} blocks of {size.hidden}/{size.intermediate};"
        f" {size.batch} x {size.length} tokens a step, gradient checkpointing; {2 * size.period} steps,"
        f" blocks drawn every {size.period}. GB = 1e9 bytes, by torch's allocator."
        f" OwLore's paper: {PUBLISHED:g} GB for a 7B model, its batch and length not given."
    )
    yield from [
        "",
        "| method | peak GB | model GB | held after the last step | s a step | s of a step that draws blocks |",
    ]
    yield "|---|--:|--:|--:|--:|--:|"
    for name in names:
        try:
            row = measured(name, size, device)
        except torch.cuda.OutOfMemoryError:
            yield f"| {name} | out of memory | | | | |"
            continue
        yield f"| {name} | " + " | ".join(row) + " |"


def measured(name: str, size: Size, device: torch.device) -> list[str]:
    """One row. What it takes to draw blocks: a step on which projectors are computed anew."""
    cuda = device.type == "cuda"
    model = build(size, device)
    model.config.use_cache = False
    weights = held(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model, optimizer, at = METHODS[name](model, size)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    seconds: list[float] = []
    for step in range(2 * size.period):
        ids = torch.randint(size.vocabulary, (size.batch, size.length), device=device)
        started = time.perf_counter()
        at(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    after = held(device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    plain = [one for step, one in enumerate(seconds) if step % size.period]
    numbers = [f"{value / 1e9:.2f}" for value in (peak, weights, after)]
    return [*numbers, f"{statistics.median(plain):.3f}", f"{seconds[size.period]:.3f}"]


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# -- what is compared


def adam(groups: Any, device: torch.device) -> Optimizer:
    """Adam's moments have the dtype of the weights; fused, since a list of all changes would double the memory."""
    return torch.optim.AdamW(groups, lr=1e-5, fused=device.type == "cuda")


def owlore(model: nn.Module, size: Size, always: tuple[str, ...] = ("*",)) -> Prepared:
    low_rank = LowRank(size.rank)
    sampling = LayerSampling(model, blocks=min(5, size.blocks), period=size.period, low_rank=low_rank, always=always)
    optimizer = LowRankAdam(sampling.groups(1e-5))
    sampling.watch(optimizer)
    return model, optimizer, sampling.at


def owlore_inside(model: nn.Module, size: Size) -> Prepared:
    return owlore(model, size, always=())


def lisa(model: nn.Module, size: Size) -> Prepared:
    sampling = LayerSampling(model, blocks=2, period=size.period)
    optimizer = adam(sampling.groups(1e-5), next(model.parameters()).device)
    sampling.watch(optimizer)
    return model, optimizer, sampling.at


def lora(model: nn.Module, size: Size) -> Prepared:
    from peft import LoraConfig, get_peft_model

    device = next(model.parameters()).device
    with contextlib.suppress(AttributeError):
        model.enable_input_require_grads()
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    trained = [one for one in tuned.parameters() if one.requires_grad]
    return tuned, adam(trained, device), lambda step: None


def galore(model: nn.Module, size: Size) -> Prepared:
    groups = parameter_groups(model, 1e-5, low_rank=LowRank(size.rank, size.period))
    return model, LowRankAdam(groups), lambda step: None


def full(model: nn.Module, size: Size) -> Prepared:
    return model, adam(model.parameters(), next(model.parameters()).device), lambda step: None


METHODS: dict[str, Callable[[nn.Module, Size], Prepared]] = {
    "lora": lora,
    "lisa": lisa,
    "owlore": owlore,
    "owlore, embeddings frozen": owlore_inside,
    "galore": galore,
    "full": full,
}

if __name__ == "__main__":
    main()
