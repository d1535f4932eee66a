"""Choose the widths of a convolutional network before it is trained, train the smaller dense network, save it and load it again.

    python examples/precrop_cnn.py

A small residual network for scikit-learn's digits at a quarter of its weights and multiply-adds (PreCrop, arXiv:2203.02549), beside
the full one. No mask and no special layer is left: any code that runs the full network runs the small one.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.evaluate import accuracy
from layerwise.io import load_cropped, save_cropped
from layerwise.methods import PreCrop
from layerwise.shrink import crop
from layerwise.tasks import images


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


def train(model: nn.Module, data: lw.Batches, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for _ in range(epochs):
        for batch in data:
            loss = F.cross_entropy(model.train()(batch["pixel_values"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(epochs: int = 6) -> dict[str, float]:
    training, held_out = images("digits", batch=64), images("digits", split="held-out")

    plan = PreCrop(parameters=0.25, macs=0.25, min_channels=4).plan(Network(), training)
    print(plan.notes[0])
    for name, entry in plan.layers.items():
        print(f"  {name}: {entry.resize.channels if entry.resize else '?'} channels")

    found = {}
    for name in ("full", "cropped"):
        model = Network()
        crop(model, plan if name == "cropped" else plan.model_copy(update={"layers": {}}), seed=0)  # both start anew
        train(model, training, epochs)
        found[name] = accuracy(model, held_out).top1
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {count:,} parameters, accuracy {found[name]:.1%}")

    with tempfile.TemporaryDirectory() as folder:
        saved = save_cropped(model, Path(folder) / "cropped", plan)
        again = load_cropped(Network(), saved)  # your constructor, at full width
        found["loaded"] = accuracy(again, held_out).top1
    return found


if __name__ == "__main__":
    main()
