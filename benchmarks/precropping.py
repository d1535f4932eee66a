"""Widths from the expected flow against equal widths and SynFlow's masks, at the same multiply-adds, trained alike on CIFAR-10.

    python benchmarks/precropping.py --bed FOLDER --epochs 160 --seeds 3                                # the usual length: a GPU's work
    python benchmarks/precropping.py --bed FOLDER --epochs 4 --images 3000 --pixels 16 --width 8        # minutes on a CPU

Two networks: ResNet-20 and a small MobileNetV2 of depthwise blocks. Every network (model, form, share, seed) is a line in the `.jsonl`
beside the table as soon as it is trained, so that a run that was killed goes on where it stopped. Speed is that of the fastest tenth of
the training steps, since other work shares the machine.
"""

import argparse
import os
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
from layerwise.methods import PreCrop, SynFlow
from layerwise.plan import Plan, Resize
from layerwise.randomness import generator_for
from layerwise.recover import hold
from layerwise.shrink import crop
from layerwise.structure import Channels, cnn_channels
from lines import Lines
from measuring import machine
from random_pruning import pixels
from resnet20 import ResNet20, augmented

HERE = Path(__file__).parent
FORMS = {
    "precrop": "PreCrop, budget of multiply-adds",
    "precrop-both": "PreCrop, the same share of weights too",
    "uniform": "every group the same share of its width",
    "synflow": "SynFlow's mask (unstructured)",
}
ROUNDS = 30  # of SynFlow; its density is bisected, so that the paper's 100 would take far longer


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class SmallMobileNet(nn.Module):
    """MobileNetV2's blocks in three stages of two, for images of 16 to 32 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stages = [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        inputs = [width, *(outputs for outputs, _ in stages)]
        self.blocks = nn.Sequential(*(Inverted(i, o, s) for i, (o, s) in zip(inputs, stages, strict=False)))
        self.last = nn.Sequential(
            nn.Conv2d(4 * width, 16 * width, 1, bias=False), nn.BatchNorm2d(16 * width), nn.ReLU6()
        )
        self.fc = nn.Linear(16 * width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(self.last(self.blocks(self.stem(pixel_values))).mean((2, 3)))


MODELS = {"resnet20": ResNet20, "mobilenet": SmallMobileNet}


@dataclass(frozen=True)
class Cell:
    """One trained network. The dense one has share 1."""

    model: str
    form: str = "dense"
    share: float = 1.0  # of the multiply-adds
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", type=Path, default=os.environ.get("LAYERWISE_BED"), help="folder of models and data")
    parser.add_argument("--models", default="resnet20,mobilenet")
    parser.add_argument("--shares", default="0.5,0.25,0.1", help="of the multiply-adds")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only-seed", type=int, help="train this one alone: several processes share the work")
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--images", type=int, default=19_984, help="the first so many of the training images")
    parser.add_argument("--test-images", type=int, default=4990)
    parser.add_argument("--pixels", type=int, default=32, choices=(16, 32))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no network after so many")
    parser.add_argument("--report", action="store_true", help="write the table of what is there, train nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results/precropping.md")
    options = parser.parse_args()
    if options.bed is None:
        parser.error("--bed FOLDER, or LAYERWISE_BED: see benchmarks/README.md for what it must hold.")
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, protocol = Lines(options.out.with_suffix(".jsonl")), protocol_of(options)
    started, data = time.perf_counter(), load(options)
    for cell in cells(options):
        late = time.perf_counter() - started > 60 * options.minutes
        if options.report or late or {**asdict(cell), "protocol": protocol} in results:
            continue
        row = trained(cell, data, options)
        results.add({**asdict(cell), "protocol": protocol}, row)
        print(f"{asdict(cell)}: {row}", file=sys.stderr, flush=True)
    text = "\n".join(report(results, protocol, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def protocol_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a number depends on beside its cell."""
    names = ("epochs", "images", "test_images", "pixels", "width", "lr", "batch")
    return {name: getattr(options, name) for name in names} | {"layerwise": lw.__version__, "torch": torch.__version__}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, so that a run cut short has whole seeds; dense first."""
    for seed in range(options.seeds) if options.only_seed is None else [options.only_seed]:
        for model in options.models.split(","):
            yield Cell(model, seed=seed)
            for share in map(float, options.shares.split(",")):
                for form in FORMS:
                    yield Cell(model, form, share, seed)


def trained(cell: Cell, data: dict[str, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Planned, started by the seed, trained with one recipe, judged after the last epoch."""
    model = MODELS[cell.model](options.width)
    image = (3, options.pixels, options.pixels)
    channels = cnn_channels(model, image)
    crop(model, planned(cell, model, channels), cell.seed)
    keep = masks(cell, model, channels) if cell.form == "synflow" else {}
    built = cnn_channels(model, image)
    positions = {layer.name: layer.positions for layer in built.layers if layer.kind != "norm"}
    kept = {name: int(keep[name].sum()) if keep else model.get_submodule(name).weight.numel() for name in positions}
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = options.epochs * -(-options.images // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.2)
    draw = generator_for(cell.seed, "precropping/images")
    seconds: list[float] = []
    model.train()
    with hold(model, keep or {name: torch.ones_like(model.get_submodule(name).weight) > 0 for name in kept}, optimizer):
        for _ in range(options.epochs):
            for chosen in torch.randperm(options.images, generator=draw).split(options.batch):
                images = augmented(data["train"][chosen], draw)
                began = time.perf_counter()
                loss = F.cross_entropy(model(images), data["labels"][chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if len(chosen) == options.batch:
                    seconds.append(time.perf_counter() - began)
    fast = sorted(seconds)[: max(1, len(seconds) // 10)]
    return {
        "accuracy": accuracy(model.eval(), data),
        "weights": sum(kept.values()),
        "multiply_adds": sum(count * positions[name] for name, count in kept.items()),
        "of_weights": channels.parameters({}),
        "of_multiply_adds": channels.multiply_adds({}),
        "images_per_second": options.batch * len(fast) / sum(fast),
        "train_loss": float(loss.detach()),
    }


def planned(cell: Cell, model: nn.Module, channels: Channels) -> Plan:
    """The plan of widths; of the dense network and of one under masks, one that changes nothing."""
    size = "x".join(map(str, channels.image))
    if cell.form == "precrop":
        return PreCrop(parameters=None, macs=cell.share, image_size=size).plan(model)
    if cell.form == "precrop-both":
        return PreCrop(parameters=cell.share, macs=cell.share, image_size=size).plan(model)
    widths = evenly(channels, cell.share) if cell.form == "uniform" else channels.widths
    return Plan(method={"image_size": size}, layers={name: Resize(channels=one) for name, one in widths.items()})


def evenly(channels: Channels, share: float) -> dict[str, int]:
    """The same share of every width, as much as fits: the group that is furthest below grows first."""
    full, budget = channels.widths, share * channels.multiply_adds({})
    widths = dict.fromkeys(full, 1)
    while True:
        fits = [
            name
            for name, one in widths.items()
            if one < full[name] and channels.multiply_adds({**widths, name: one + 1}) <= budget
        ]
        if not fits:
            return widths
        widths[min(fits, key=lambda name: widths[name] / full[name])] += 1


def masks(cell: Cell, model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    """SynFlow's mask of the density whose multiply-adds fit: kept weights alone count."""
    positions = {layer.name: layer.positions for layer in channels.layers}
    weights = [layer.name for layer in channels.layers if layer.kind != "norm"]
    structure = lw.structure_of(model, include=weights)
    batch = lw.Batches(({"pixel_values": torch.ones(1, *channels.image)},), {})
    low, high, best = 0.0, 0.999, None
    for _ in range(7):
        middle = (low + high) / 2
        keep = SynFlow(sparsity=middle, rounds=ROUNDS).keep(model, batch, structure=structure)
        used = sum(int(mask.sum()) * positions[name] for name, mask in keep.items())
        if used <= cell.share * channels.multiply_adds({}):
            best, high = keep, middle
        else:
            low = middle
    assert best is not None
    return best


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, Tensor]) -> float:
    said = torch.cat([model(part).argmax(1) for part in data["test"].split(500)])
    return float((said == data["test_labels"]).float().mean())


def load(options: argparse.Namespace) -> dict[str, Tensor]:
    folder = Path(options.bed) / "data"
    train, test = (np.load(folder / f"{name}.npz") for name in ("cifar10-train-20k", "cifar10-test-a"))
    return {
        "train": pixels(train["images"][: options.images], options.pixels),
        "labels": torch.from_numpy(train["labels"][: options.images].astype(np.int64)),
        "test": pixels(test["images"][: options.test_images], options.pixels),
        "test_labels": torch.from_numpy(test["labels"][: options.test_images].astype(np.int64)),
    }


def report(results: Lines, protocol: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    yield "# Widths before training, at the same multiply-adds"
    yield ""
    yield f"Machine: {machine()}, shared with other work; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: CIFAR-10, the first {options.images} training images at {options.pixels} x {options.pixels} pixels,"
        f" {options.epochs} epochs of SGD (one cycle to {options.lr:g}, batch {options.batch}, crops and flips), the same for all,"
        f" first {options.test_images} images"
        f" of the test half; first stage {options.width} channels wide. SynFlow: {ROUNDS} rounds, kept weights counted alone."
    )
    yield "Images/s: forward, backward and step, of the fastest tenth of the steps; masks make nothing faster."
    for model in options.models.split(","):
        yield from (
            "",
            f"## {model}",
            "",
            "| multiply-adds asked | form | multiply-adds | weights | accuracy, % | images/s | seeds |",
        )
        yield "|---|---|---|---|---|---|---|"
        for share, form in [(1.0, "dense"), *((s, f) for s in map(float, options.shares.split(",")) for f in FORMS)]:
            rows = results.of(model=model, form=form, share=share, protocol=protocol)
            if not rows:
                continue
            mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            scores = [100 * row["accuracy"] for row in rows]
            spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(rows) > 1 else ""
            yield (
                f"| {share:.0%} | {FORMS.get(form, form)} | {mean['multiply_adds'] / mean['of_multiply_adds']:.1%} |"
                f" {mean['weights'] / mean['of_weights']:.1%} | {100 * mean['accuracy']:.1f}{spread} |"
                f" {mean['images_per_second']:,.0f} | {len(rows)} |"
            )


if __name__ == "__main__":
    main()
