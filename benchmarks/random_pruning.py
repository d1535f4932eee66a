"""Does it matter which weights a network is trained without? Random masks from the start, three widths of ResNet-20, CIFAR-10.

    python benchmarks/random_pruning.py --bed FOLDER --epochs 160 --seeds 3          # the paper's length: a GPU's work
    python benchmarks/random_pruning.py --bed FOLDER --epochs 6 --images 5000 --pixels 16 --seeds 2

The claims of Liu et al. 2022 (arXiv:2202.02643): the gap to the dense network closes as networks grow, layer-wise ratios matter, and
sparse networks tell foreign images apart and are calibrated at least as well. Every network (width, sparsity, ratio, seed) is a line in the
`.jsonl` beside the table as soon as it is trained, so a run that was killed goes on where it stopped. See README.md for the protocol.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.randomness import generator_for
from layerwise.recover import hold, kaiming_normal, random_masks
from lines import Lines
from measuring import machine
from resnet20 import ResNet20, augmented, auroc, calibration_error, multiply_adds

HERE = Path(__file__).parent
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RATIOS = "erk,snip-ratio,uniform"  # names in layerwise.methods; any other there can be asked for
METRICS = {  # of a row of results: title, what is better
    "accuracy": "accuracy, %",
    "ece": "calibration error (ECE, 15 bins), %: lower is better",
    "auroc": "MNIST told apart from CIFAR-10 by the largest probability, AUROC, %",
}


@dataclass(frozen=True)
class Cell:
    """One trained network. The dense one has no sparsity."""

    width: int
    ratio: str = "dense"
    sparsity: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Pixels are float32 (n, 3, side, side), normalised; labels int64."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    foreign: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", type=Path, default=os.environ.get("LAYERWISE_BED"), help="folder of models and data")
    parser.add_argument("--widths", default="4,8,16", help="channels of the first stage; 16 is He et al.'s ResNet-20")
    parser.add_argument("--ratios", default=RATIOS)
    parser.add_argument("--sparsities", default="0.7,0.9,0.95")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...: start, mask, order of images")
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--images", type=int, default=19_984, help="the first so many of the training images")
    parser.add_argument("--test-images", type=int, default=4990, help="and of the test images, and of MNIST's")
    parser.add_argument("--pixels", type=int, default=32, help="a side: 32, or 16 (means of 2 x 2)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="write the table of what is there, train nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results/random_pruning.md")
    options = parser.parse_args()
    if options.bed is None:
        parser.error("--bed FOLDER, or LAYERWISE_BED: see benchmarks/README.md for what it must hold.")
    if options.pixels not in (16, 32):
        parser.error("--pixels: 16 or 32.")
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, protocol = Lines(options.out.with_suffix(".jsonl")), protocol_of(options)
    missing = [cell for cell in cells(options) if {**asdict(cell), "protocol": protocol} not in results]
    if missing and not options.report:
        data = load(options)
        for cell in missing:
            row = trained(cell, data, options)
            results.add({**asdict(cell), "protocol": protocol}, row)
            said = ", ".join(f"{name} {row[name]:.4f}" for name in METRICS)
            print(f"{asdict(cell)}: {said}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    text = "\n".join(report(results, protocol, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    options.out.with_suffix(".json").write_text(json.dumps(summary(results, protocol, options), indent=1) + "\n")
    print(text)


def protocol_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a number depends on beside its cell."""
    names = ("epochs", "images", "test_images", "pixels", "lr", "batch")
    return {name: getattr(options, name) for name in names} | {"layerwise": lw.__version__, "torch": torch.__version__}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, so that a run cut short has whole seeds; dense first."""
    widths, sparsities = map(int, options.widths.split(",")), [float(one) for one in options.sparsities.split(",")]
    widths = list(widths)
    for seed in range(options.seeds):
        for width in widths:
            yield Cell(width, seed=seed)
            for sparsity in sparsities:
                for ratio in options.ratios.split(","):
                    yield Cell(width, ratio, sparsity, seed)


# -- training


def trained(cell: Cell, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Start and mask by the seed, the paper's recipe in as many epochs as asked for; judged after the last one."""
    started = time.perf_counter()
    model = ResNet20(cell.width)
    structure = lw.structure_of(model, include=["*"])
    kaiming_normal(model, structure, cell.seed)  # a stream for each layer: the same start at every sparsity
    plan, keep = None, {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in structure}
    if cell.ratio != "dense":
        plan = planned(cell, model, structure, data)
        keep = random_masks(plan, structure, cell.seed)
    operations = multiply_adds(model, data.train[:1], keep)
    model.to(options.device).train()
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    turns = [round(options.epochs * part) for part in (0.5, 0.75)]  # 80 and 120 of 160
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, turns)
    draw = generator_for(cell.seed, "random_pruning/images")
    with hold(model, keep, optimizer) as masks:
        for _ in range(options.epochs):
            for chosen in torch.randperm(len(data.train), generator=draw).split(options.batch):
                images = augmented(data.train[chosen], draw).to(options.device)
                loss = F.cross_entropy(model(images), data.labels[chosen].to(options.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        assert masks.leaked() == 0
        density = masks.density
    inside, outside = (probabilities(model.eval(), one, options) for one in (data.test, data.foreign))
    densities = [float(mask.float().mean()) for mask in keep.values()]
    return {
        "accuracy": float((inside.argmax(1) == data.test_labels).float().mean()),
        "ece": calibration_error(inside, data.test_labels),
        "auroc": auroc(inside.amax(1), outside.amax(1)),
        "train_loss": float(loss.detach()),
        "density": density,
        "lowest": min(densities),
        "highest": max(densities),
        "multiply_adds": operations,
        "weights": sum(layer.size for layer in structure),
        "seconds": time.perf_counter() - started,
    }


def planned(cell: Cell, model: nn.Module, structure: lw.Structure, data: Data) -> lw.Plan:
    """Ratios from shapes, or from one batch of 25 training images of each class."""
    method = lw.methods.METHODS[cell.ratio]
    settings = {"seed": cell.seed} if cell.ratio == "snip-ratio" else {}
    made = lw.methods.method_from(cell.ratio, sparsity=cell.sparsity, **settings)
    if not method.needs_data:
        return made.plan(model, structure=structure)
    draw = generator_for(cell.seed, "random_pruning/calibration")
    order = torch.randperm(len(data.labels), generator=draw)
    chosen = torch.cat([order[data.labels[order] == label][:25] for label in range(10)])
    batch = {"pixel_values": data.train[chosen], "labels": data.labels[chosen]}
    return made.plan(model, lw.Batches((batch,), {"seed": cell.seed}), structure=structure)


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor, options: argparse.Namespace) -> Tensor:
    return torch.cat([model(part.to(options.device)).softmax(1).cpu() for part in images.split(500)])


# -- data


def load(options: argparse.Namespace) -> Data:
    """CIFAR-10, and MNIST in three equal channels with a black border, normalised alike."""
    folder = Path(options.bed) / "data"
    train, test, digits = (np.load(folder / f"{n}.npz") for n in ("cifar10-train-20k", "cifar10-test-a", "mnist-test"))
    foreign = np.pad(digits["images"][: options.test_images], ((0, 0), (2, 2), (2, 2)))
    count = options.test_images
    return Data(
        pixels(train["images"][: options.images], options.pixels),
        torch.from_numpy(train["labels"][: options.images].astype(np.int64)),
        pixels(test["images"][:count], options.pixels),
        torch.from_numpy(test["labels"][:count].astype(np.int64)),
        pixels(np.repeat(foreign[..., None], 3, axis=-1), options.pixels),
    )


def pixels(images: "np.ndarray[Any, Any]", side: int) -> Tensor:
    """uint8 (n, 32, 32, 3) to normalised float32 (n, 3, side, side)."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    values = F.avg_pool2d(values, 2) if side == 16 else values
    return ((values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).contiguous()


# -- the table


def summary(results: Lines, protocol: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    rows = [
        {**asdict(cell), **results.of(protocol=protocol, **asdict(cell))[0]}
        for cell in cells(options)
        if {**asdict(cell), "protocol": protocol} in results
    ]
    return {"protocol": protocol, "machine": machine(), "rows": rows}


def report(results: Lines, protocol: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    yield "# Random pruning before training, by width"
    yield ""
    yield f"Machine: {machine()}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: ResNet-20, first {options.images} training images of CIFAR-10, {options.pixels} x {options.pixels} pixels,"
        f" {options.epochs} epochs, batch {options.batch}, SGD with Nesterov momentum 0.9, weight decay 5e-4, rate {options.lr} and a"
        " tenth of it after a half and three quarters; crops and flips. Fixed random masks from the first step, start and order of"
        f" images by seed. Judged after the last epoch on {options.test_images} test images and as many of MNIST (three channels)."
        " Mean ± standard deviation over seeds; in brackets the difference to the dense network of the same width and seeds."
    )
    widths, sparsities = options.widths.split(","), [float(one) for one in options.sparsities.split(",")]
    for metric, title in METRICS.items():
        yield from ["", f"## {title[0].upper()}{title[1:]}", ""]
        yield f"| ratio | sparsity | {' | '.join(f'width {width}' for width in widths)} |"
        yield f"|---|--:|{'--:|' * len(widths)}"
        yield f"| dense | 0% | {' | '.join(shown(results, protocol, metric, Cell(int(w)), options) for w in widths)} |"
        for sparsity in sparsities:
            for ratio in options.ratios.split(","):
                found = [shown(results, protocol, metric, Cell(int(w), ratio, sparsity), options) for w in widths]
                yield f"| {ratio} | {sparsity:.0%} | {' | '.join(found)} |"
    yield from [
        "",
        "## What it costs to run",
        "",
        "Multiply-adds of an image that a perfect sparse engine would do, in thousands.",
    ]
    yield from [
        "",
        f"| ratio | sparsity | {' | '.join(f'width {width}' for width in widths)} |",
        f"|---|--:|{'--:|' * len(widths)}",
    ]
    for sparsity, ratio in [(0.0, "dense"), *((s, r) for s in sparsities for r in options.ratios.split(","))]:
        per_width = [results.of(protocol=protocol, width=int(w), ratio=ratio, sparsity=sparsity) for w in widths]
        costs = [
            f"{statistics.fmean(row['multiply_adds'] for row in rows) / 1e3:.0f}" if rows else "–" for rows in per_width
        ]
        yield f"| {ratio} | {sparsity:.0%} | {' | '.join(costs)} |"
    done = [row for cell in cells(options) for row in results.of(protocol=protocol, **asdict(cell))]
    yield from ["", f"{len(done)} networks, {sum(row['seconds'] for row in done) / 60:.0f} minutes in all."]


def shown(results: Lines, protocol: dict[str, Any], metric: str, cell: Cell, options: argparse.Namespace) -> str:
    """ "51.2 ± 0.4 (-3.1)", in percent; a dash where nothing was trained yet."""
    rows, dense = (
        {
            s: r[0][metric] * 100
            for s in range(options.seeds)
            if (r := results.of(protocol=protocol, **asdict(c) | {"seed": s}))
        }
        for c in (cell, Cell(cell.width))
    )
    if not rows:
        return "–"
    deviation = f" ± {statistics.stdev(rows.values()):.1f}" if len(rows) > 1 else ""
    both = rows.keys() & dense.keys()
    gap = statistics.fmean(rows[seed] - dense[seed] for seed in both) if both and cell.ratio != "dense" else None
    return f"{statistics.fmean(rows.values()):.1f}{deviation}" + (f" ({gap:+.1f})" if gap is not None else "")


if __name__ == "__main__":
    main()
