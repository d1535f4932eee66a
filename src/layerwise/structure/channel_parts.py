"""The channels of a convolutional network as entries of its parameters, so that they can be cut out of trained weights."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .cnn_channels import ChannelLayer, Channels, Run
from .coupled import Coupling, Group, Part

Place = tuple[str, int, str]  # parameter, dimension, side


def coupling_of(model: nn.Module, channels: Channels) -> Coupling:
    """The groups of `channels` with their entries in the parameters of `model`; norms and biases go with what writes them."""
    found: dict[str, list[Part]] = {group.name: [] for group in channels.groups}
    for layer in channels.layers:
        module = model.get_submodule(layer.name)
        for own, dim, side, runs in places(layer):
            parameter = module._parameters.get(own)
            if parameter is None:
                continue
            for name, index in entries(runs).items():
                full = f"{layer.name}.{own}" if layer.name else own
                scored = own == "weight" and layer.kind != "norm"
                found[name].append(Part(full, dim, index, side, scored))
    return Coupling(
        tuple(
            Group(group.name, "channels", group.units, tuple(found[group.name]), block=group.name)
            for group in channels.groups
        ),
        channels.left,
    )


def places(layer: ChannelLayer) -> list[tuple[str, int, Literal["out", "in"], tuple[Run, ...]]]:
    """(own name of a parameter, dimension, side, runs along it) of a layer. A norm and a depthwise convolution pass channels on: what they
    have for each goes with what writes it."""
    turned = layer.kind == "transposed"  # its weight is (inputs, outputs, kernel)
    found: list[tuple[str, int, Literal["out", "in"], tuple[Run, ...]]] = [
        ("weight", int(turned), "out", layer.outputs),
        ("bias", 0, "out", layer.outputs),
    ]
    if turned:
        found.append(("weight", 0, "in", layer.inputs))
    elif layer.kind in ("conv", "linear"):
        found.append(("weight", 1, "in", _first_group(layer.inputs, layer.groups)))
    return found


def entries(runs: Sequence[Run]) -> dict[str, Tensor]:
    """Group -> int64 (units, entries): where the channels of each unit lie."""
    found: dict[str, list[Tensor]] = {}
    at = 0
    for run in runs:
        size = run.units * run.inner
        if run.group is not None:
            found.setdefault(run.group, []).append(
                (at + torch.arange(size, device="cpu")).reshape(run.units, run.inner)
            )
        at += size
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def _first_group(runs: tuple[Run, ...], groups: int) -> tuple[Run, ...]:
    """What the first of a convolution's groups reads: the others read the same units of the same variables."""
    size = sum(run.units * run.inner for run in runs) // groups
    first, at = [], 0
    for run in runs:
        if at == size:
            break
        if at + run.units * run.inner > size:  # channels that never change may lie across
            run = Run(None, size - at)
        first.append(run)
        at += run.units * run.inner
    return tuple(first)
