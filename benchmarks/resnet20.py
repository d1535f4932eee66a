"""A ResNet-20 for CIFAR-10 with what training and judging it takes: crops and flips, operations, calibration, foreign images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016, with 1x1 convolutions on the shortcuts: 270 896 weights at width 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in pairs))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(pixel_values)))).mean((2, 3)))


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Padded by an eighth of the side (4 of 32) by reflection, cropped anywhere, flipped half of the time."""
    side = images.shape[-1]
    by = side // 8
    padded = F.pad(images, [by] * 4, mode="reflect")
    top, left = (torch.randint(2 * by + 1, (len(images), 1), generator=draw) for _ in range(2))
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    flipped = torch.rand(len(images), 1, generator=draw) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    number = torch.arange(len(images))[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def multiply_adds(model: nn.Module, image: Tensor, keep: Mapping[str, Tensor]) -> int:
    """Of one image, counting kept weights alone: every kept weight multiplies once for each position of its layer's output."""
    total, handles = 0, []

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal total
            total += int(keep[name].sum()) * (output[0, 0].numel() if output.ndim == 4 else 1)

        return hook

    for name in keep:
        handles.append(model.get_submodule(name).register_forward_hook(count(name)))
    model.eval()(image)
    for handle in handles:
        handle.remove()
    return total


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE of Guo et al. 2017: the mean over images of |accuracy - confidence| of their bin; bins of equal width, upper edges in."""
    confidence, said = probabilities.max(1)
    right = (said == labels).double()
    place = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    counts, hits, sums = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, value)
        for value in (torch.ones_like(right), right, confidence.double())
    )
    return float((hits - sums).abs().sum() / counts.sum())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often a score of `inside` is above one of `outside`; ties count half."""
    ordered = outside.double().sort().values
    below, upto = (torch.searchsorted(ordered, inside.double(), right=right) for right in (False, True))
    return float((below + upto).double().mean() / 2 / len(ordered))
