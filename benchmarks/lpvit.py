"""A trained ViT pruned in blocks: accuracy against density, before and after a short fine-tuning, beside uniform and magnitude.

    python benchmarks/lpvit.py --bed FOLDER --out benchmarks/results/lpvit.md

Every measurement is a line of the `.jsonl` beside the table; killed, it goes on where it was.
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.allocate import TABLES
from layerwise.evaluate import accuracy
from layerwise.methods import LPViT, Uniform
from layerwise.methods.block_costs import costs_of
from layerwise.recover import Distillation, fine_tune, masks_of, warm_cosine
from layerwise.runtime.gather import GatherLinear
from layerwise.solvers import Magnitude, SparseGPT
from layerwise.tasks import Batches
from lines import Lines
from measuring import machine
from vit_cifar import ViT, cifar, load_vit

Planner = Callable[[float, str], Any]
FLAT = 0.02  # a share that is nearly the same everywhere leaves room for whole blocks


@dataclass(frozen=True)
class Way:
    """One row of the table: a plan, what takes the blocks out, and whether it is fine-tuned."""

    label: str
    plan: Planner
    solver: Any
    tuned: bool = True


WAYS = {
    "uniform": Way("uniform, blocks of least magnitude", lambda s, p: Uniform(sparsity=s, pattern=p), Magnitude()),
    "uniform-sparsegpt": Way(
        "uniform, blocks by sparsegpt, made up for", lambda s, p: Uniform(sparsity=s, pattern=p), SparseGPT()
    ),
    "flat": Way(
        "LPViT's blocks, nearly the same share in every layer",
        lambda s, p: LPViT(sparsity=s, pattern=p, min_sparsity=s - FLAT, max_sparsity=s + FLAT),
        Magnitude(),
        tuned=False,
    ),
    "reference": Way(
        "LPViT, the official objective", lambda s, p: LPViT(sparsity=s, pattern=p, reference=True), Magnitude(), False
    ),
    "lpvit": Way("LPViT", lambda s, p: LPViT(sparsity=s, pattern=p), Magnitude()),
    "greedy": Way("LPViT, order=greedy", lambda s, p: LPViT(sparsity=s, pattern=p, order="greedy"), Magnitude(), False),
    "measured": Way("LPViT, measured=32", lambda s, p: LPViT(sparsity=s, pattern=p, measured=32), Magnitude()),
    "lpvit-sparsegpt": Way(
        "LPViT's blocks, made up for by sparsegpt", lambda s, p: LPViT(sparsity=s, pattern=p), SparseGPT()
    ),
    "measured-sparsegpt": Way(
        "the same, measured=32", lambda s, p: LPViT(sparsity=s, pattern=p, measured=32), SparseGPT()
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bed", type=Path, default=os.environ.get("LAYERWISE_BED"), help="folder of models and images")
    parser.add_argument("--blocks", default="8,16,32")
    parser.add_argument("--densities", default="0.8,0.6", help="fraction of the multiply-adds that stays")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--tune", type=int, default=1000, help="training images of the fine-tuning, once each")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--report", action="store_true", help="write the table of what is there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lpvit.md"))
    options = parser.parse_args()
    if options.bed is None:
        raise SystemExit("give the folder of models and images: --bed FOLDER, or LAYERWISE_BED in the environment.")
    torch.set_num_threads(1)
    results, protocol = Lines(options.out.with_suffix(".jsonl")), protocol_of(options)
    if not options.report:
        measure(results, protocol, options)
    options.out.write_text("\n".join(report(results, protocol, options)) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


def protocol_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("images", "calibration", "tune", "lr")
    return {name: getattr(options, name) for name in names} | {"torch": torch.__version__, "layerwise": lw.__version__}


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for density in map(float, options.densities.split(",")):
        for block in map(int, options.blocks.split(",")):
            for way in options.ways.split(","):
                yield {"block": block, "density": density, "way": way}


# -- measuring


def measure(results: Lines, protocol: dict[str, Any], options: argparse.Namespace) -> None:
    dense, bed = load_vit(options.bed), Path(options.bed)
    test = cifar(bed, "test-a", 0, options.images)
    calibration = cifar(bed, "train-20k", 0, options.calibration, batch=64)
    tuning = cifar(bed, "train-20k", options.calibration, options.tune, batch=50)
    key = {"protocol": protocol, "way": "dense"}
    if key not in results:
        results.add(key, {"top1": accuracy(dense, test).top1, "machine": machine()})
    for cell in cells(options):
        key = {"protocol": protocol, **cell}
        if key not in results:
            row = pruned(cell, dense, calibration, test, tuning, options.lr)
            results.add(key, row)
            print({**cell, **row}, flush=True)
    if options.speed and (key := {"protocol": protocol, "way": "speed"}) not in results:
        results.add(key, {"rows": list(speeds())})


def pruned(
    cell: dict[str, Any], dense: ViT, calibration: Batches, test: Batches, tuning: Batches, lr: float
) -> dict[str, Any]:
    way, block, started = WAYS[cell["way"]], cell["block"], time.process_time()
    structure = lw.structure_of(dense)
    try:
        plan = way.plan(round(1 - cell["density"], 6), f"block({block}x{block})").plan(dense, calibration)
    except lw.errors.BudgetError as error:  # of equal slopes
        return {"failed": str(error)}
    planning = time.process_time() - started
    model = copy.deepcopy(dense)
    result = lw.compress(model, plan, solver=way.solver, data=calibration)
    costs = costs_of(dense, calibration[0], structure.layers, structure, (block, block), TABLES["float16"])
    gone = plan.zeros(structure.layers)
    kept = {layer.name: (layer.size - gone[layer.name]) // block**2 for layer in structure}
    shares = {kind: costs.of_kept(kind, kept) / costs.total(kind) for kind in ("macs", "energy")}
    row = {
        **shares,
        "lowest": min(one / costs.blocks[name] for name, one in kept.items()),
        "highest": max(one / costs.blocks[name] for name, one in kept.items()),
        "dead_rows": sum("have no block left" in note for note in result.notes),
        "planning_seconds": planning,
        "before": accuracy(model, test).top1,
        "after": None,
    }
    if way.tuned:
        started = time.process_time()
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
        schedule = warm_cosine(optimizer, len(tuning))
        keep = masks_of(model, [layer.name for layer in structure])
        fine_tune(model, tuning, optimizer, keep=keep, loss=Distillation(dense), schedule=schedule, clip=1.0)
        row |= {"tuning_seconds": time.process_time() - started, "after": accuracy(model, test).top1}
    return row


def speeds(rows: int = 3072, columns: int = 768, tokens: int = 788, block: int = 32) -> Iterator[dict[str, Any]]:
    """Milliseconds of one linear, the least of several calls that take turns, one thread."""
    draw = torch.Generator().manual_seed(0)
    x, linear = torch.randn(tokens, columns, generator=draw), nn.Linear(columns, rows).requires_grad_(False)
    for density in (0.5, 0.25, 0.1):
        keep = torch.rand(rows // block, columns // block, generator=draw) < density
        linear.weight.copy_(torch.randn(rows, columns, generator=draw))
        linear.weight *= keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
        gathered = GatherLinear(linear.weight, linear.bias, block)
        bsr = linear.weight.to_sparse_bsr((block, block))
        calls: dict[str, Callable[[], Tensor]] = {
            "dense": lambda: linear(x),
            "gathered": lambda g=gathered: g(x),  # type: ignore[misc]
            "bsr": lambda b=bsr: F.linear(x, b, linear.bias),  # type: ignore[misc]
        }
        best = dict.fromkeys(calls, math.inf)
        for _ in range(7):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                best[name] = min(best[name], 1000 * (time.perf_counter() - started))
        yield {"density": float(keep.float().mean()), **best}


# -- the report


def report(results: Lines, protocol: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    dense = results.of(protocol=protocol, way="dense")
    if not dense:
        raise SystemExit("nothing was measured yet.")
    error = math.sqrt(dense[0]["top1"] * (1 - dense[0]["top1"]) / options.images)
    yield from (
        "# Blocks of weights in a trained ViT",
        "",
        f"The bed's post-norm ViT on CIFAR-10: {dense[0]['top1']:.1%} dense on the first {options.images} test images (standard error"
        f" {error:.1%}). Its 24 matrices in blocks are pruned; {options.calibration} training images for calibration. Fine-tuning: the next"
        f" {options.tune} training images once, batches of 50, AdamW {options.lr:g} with a cosine, masks held, half the loss from the dense"
        " model. One seed: differences of two standard errors and less may be chance. Energy by the energy model, float16 table.",
        "",
        f"{dense[0]['machine']}; one thread of a busy machine; torch {protocol['torch']}.",
        "",
        "| density of MACs | block | way | top-1, pruned | top-1, fine-tuned | energy | layers' densities | planning, CPU s |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    )
    for cell in cells(options):
        for row in results.of(protocol=protocol, **cell):
            if "failed" in row:
                yield f"| – | {cell['block']} | {WAYS[cell['way']].label} | no slope within 2 % of the budget | | | | |"
                continue
            after = "–" if row["after"] is None else f"{row['after']:.1%}"
            yield (
                f"| {row['macs']:.1%} | {cell['block']} | {WAYS[cell['way']].label} | {row['before']:.1%} | {after} | {row['energy']:.1%} |"
                f" {row['lowest']:.0%}–{row['highest']:.0%} | {row['planning_seconds']:.1f} |"
            )
    yield from speed_table(results.of(protocol=protocol, way="speed"))


def speed_table(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield from (
        "",
        "## One linear on a CPU",
        "",
        "3072 outputs, 768 inputs, 788 tokens, blocks of 32, float32, one thread: milliseconds, the least of seven.",
        "",
        "| density | dense | gathered blocks (`GatherLinear`) | PyTorch's BSR |",
        "|--:|--:|--:|--:|",
    )
    for row in found[0]["rows"]:
        yield f"| {row['density']:.0%} | {row['dense']:.1f} | {row['gathered']:.1f} | {row['bsr']:.1f} |"


if __name__ == "__main__":
    main()
