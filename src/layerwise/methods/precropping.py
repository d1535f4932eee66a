"""PreCrop and PreConfig: the widths of a convolutional network from the densities of its layers, before it is trained (Cai et al. 2022,
"Structured Pruning is All You Need for Pruning CNNs at Initialization", arXiv:2203.02549).

The result is a smaller dense network, initialised anew (`shrink.crop`). No official code exists; this is the second generation of the
paper (the expected flow, without data) with the scorers of the first as sources. Choices where the paper leaves them open: G1 widths are
solved for jointly, not layer by layer, since layers that share channels ask for different densities. G2 tensors that meet at an addition
have one width ("tie"), or stay as they are ("inside"). G3 PreConfig is capped at twice the width, without which cheap layers swallow the
budget. Budgets count the weights of convolutions and linears and their multiply-adds; biases and norms are not counted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..allocate import Program, Shape, Side, Steps, erdos_renyi, fitted_widths, joint_widths, whole_widths
from ..errors import ConfigError, DataError, ModelError
from ..plan import Budget, Plan, Resize
from ..structure import ChannelLayer, Channels, Run, Structure, cnn_channels, structure_of
from ..tasks.batches import Batches
from .assemble import facts_of
from .base import needed
from .grasp import GraSP
from .snip import SNIP
from .synflow import SynFlow

Source = Literal["synexp", "synflow", "snip", "grasp", "erk"]
Residual = Literal["tie", "inside"]
SOURCES, RESIDUALS = ("synexp", "synflow", "snip", "grasp", "erk"), ("tie", "inside")


@dataclass(frozen=True)
class PreCrop:
    """Every group of channels keeps its width or less."""

    name: ClassVar[str] = "precrop"
    summary: ClassVar[str] = (
        "fewer channels in a CNN that is not trained yet, by its expected flow; dense and started anew"
    )
    needs_data: ClassVar[bool] = False  # a size of images will do, but for snip and grasp

    parameters: float | None = 0.5  # share of the weights that is kept; None: no such budget
    macs: float | None = 0.5  # share of the multiply-adds
    source: Source = "synexp"
    residual: Residual = "tie"
    min_channels: int = 1  # 8 suits accelerators, and so does the next
    multiple_of: int = 1
    image_size: str = ""  # channels x height x width, such as "3x32x32"; else that of the data

    def __post_init__(self) -> None:
        _check(self, most=1.0)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """The widths of the groups that change; a group is named by the layer that first writes it. See `Method.plan`.

        data: batches with `pixel_values`, or any one tensor beside labels, whose shape alone counts (values for snip and grasp). Raises
        ModelError for a model whose channels cannot be followed, BudgetError with what would be feasible.
        """
        return _planned(self, model, data, structure, most=1.0)


@dataclass(frozen=True)
class PreConfig:
    """Groups may also become wider, so that a network of the same cost has other proportions."""

    name: ClassVar[str] = "preconfig"
    summary: ClassVar[str] = (
        "channels of a CNN that is not trained yet moved between layers, some wider; dense and started anew"
    )
    needs_data: ClassVar[bool] = False

    parameters: float | None = 1.0
    macs: float | None = 1.0
    source: Source = "synexp"
    residual: Residual = "tie"
    min_channels: int = 1
    multiple_of: int = 1
    max_ratio: float = 2.0  # the widest a group may become, in times its width
    image_size: str = ""

    def __post_init__(self) -> None:
        _check(self, most=float("inf"))
        if not 1 <= self.max_ratio < float("inf"):
            raise ConfigError(f"PreConfig.max_ratio={self.max_ratio:g}: give at least 1, which lets no group grow.")

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """See `PreCrop.plan`."""
        return _planned(self, model, data, structure, most=self.max_ratio)


def _check(method: PreCrop | PreConfig, most: float) -> None:
    owner = type(method).__name__
    if method.parameters is None and method.macs is None:
        raise ConfigError(f"{owner}: give parameters, macs or both.")
    for name in ("parameters", "macs"):
        share = getattr(method, name)
        if share is not None and not 0 < share <= most:
            upper = f", at most {most:g}" if most < float("inf") else ""
            raise ConfigError(f"{owner}.{name}={share:g}: give the share that is kept, above 0{upper}.")
    if method.source not in SOURCES:
        raise ConfigError(f'{owner}.source="{method.source}": give one of {", ".join(SOURCES)}.')
    if method.residual not in RESIDUALS:
        raise ConfigError(f'{owner}.residual="{method.residual}": give one of {", ".join(RESIDUALS)}.')
    if min(method.min_channels, method.multiple_of) < 1:
        raise ConfigError(f"{owner}: min_channels and multiple_of are at least 1.")
    if method.image_size:
        _sizes(owner, method.image_size)


def _planned(
    method: PreCrop | PreConfig, model: nn.Module, data: Batches | None, structure: Structure | None, most: float
) -> Plan:
    owner = type(method).__name__
    image = _image(owner, method.image_size, data)
    channels = cnn_channels(model, image)
    free = {one.name: one.units for one in channels.groups if method.residual == "tie" or not one.residual}
    if not free:
        raise ModelError(f"{type(model).__name__}: no group of channels may change. {_reasons(channels)}")
    layers = [one for one in channels.layers if one.kind != "norm"]
    program = Program([_shape(one, method, set(free)) for one in layers], list(free))
    totals = (channels.parameters({}), channels.multiply_adds({}))
    budgets = [share * total for share, total in zip((method.parameters, method.macs), totals, strict=True) if share]
    steps = {
        name: Steps(units, min(units, method.min_channels), int(most * units + 1e-9), method.multiple_of)
        for name, units in free.items()
    }
    low = {name: float(one.allowed[0]) for name, one in steps.items()}
    high = {name: float(one.allowed[-1]) for name, one in steps.items()}
    densities: dict[str, float] = {}
    if method.source == "synexp":
        wanted = joint_widths(program, budgets, low, high)
    else:
        densities = _densities(method, model, data, layers, image)
        full = {name: float(units) for name, units in free.items()}
        wanted = fitted_widths(program, list(densities.values()), budgets, low, high, full)
    widths = whole_widths(program, budgets, wanted, steps)
    left = (channels.parameters(widths), channels.multiply_adds(widths))
    return Plan(
        model=facts_of(model, structure or structure_of(model)),
        method=dataclasses.replace(method, image_size="x".join(map(str, image))),  # where it says what was counted
        budget=Budget(
            parameters=None if method.parameters is None else int(method.parameters * totals[0] + 1e-6),
            flops=None if method.macs is None else 2 * int(method.macs * totals[1] + 1e-6),
        ),
        layers={name: Resize(channels=width) for name, width in widths.items() if width != free[name]},
        scores=densities,
        notes=(
            f"{left[0]:,} of {totals[0]:,} weights ({left[0] / totals[0]:.2%}) and {left[1]:,} of {totals[1]:,} multiply-adds"
            f" ({left[1] / totals[1]:.2%}) for one image of {'x'.join(map(str, image))}; biases and norms are not counted.",
            *(
                f'"{name}" keeps its channels: {why}.'
                for name, why in channels.left
                if "output of the model" not in why
            ),
        ),
    )


def _shape(layer: ChannelLayer, method: PreCrop | PreConfig, free: set[str]) -> Shape:
    each = layer.kernel / layer.groups
    costs = [cost for share, cost in ((method.parameters, each), (method.macs, each * layer.positions)) if share]
    sides = [layer.outputs] if layer.kind == "depthwise" else [layer.inputs, layer.outputs]
    return Shape(tuple(costs), tuple(_side(runs, free) for runs in sides))


def _side(runs: Sequence[Run], free: set[str]) -> Side:
    parts: dict[str, int] = {}
    for run in runs:
        if run.group in free:
            parts[str(run.group)] = parts.get(str(run.group), 0) + run.inner
    return Side(sum(run.units * run.inner for run in runs if run.group not in free), tuple(parts.items()))


def _densities(
    method: PreCrop | PreConfig,
    model: nn.Module,
    data: Batches | None,
    layers: Sequence[ChannelLayer],
    image: tuple[int, ...],
) -> dict[str, float]:
    """Layer -> share of its weights that the source keeps; a layer that it empties keeps one weight."""
    share = method.parameters if method.parameters is not None else method.macs
    share = min(1.0, share or 1.0)
    names = {one.name for one in layers}
    found = structure_of(model, include=["*"])
    kept = structure_of(model, include=[one.name for one in found if one.name in names])
    if unscored := names - {one.name for one in kept}:
        raise ModelError(
            f'source="{method.source}" gives no density to "{min(unscored)}": it scores linears and convolutions, transposed ones left out.'
            ' Give source="synexp".'
        )
    if method.source == "erk":
        shapes = {one.name: one.shape for one in kept}
        densities: Mapping[str, float] = erdos_renyi(shapes, share)
    elif share == 1.0:
        densities = {one.name: 1.0 for one in kept}
    else:
        sources = {"synflow": SynFlow, "snip": SNIP, "grasp": GraSP}
        if method.source == "synflow" and (data is None or not len(data)):  # of it the shape alone counts
            data = Batches(({"pixel_values": torch.ones(1, *image)},), {})
        scorer = sources[method.source](sparsity=1 - share)
        zeros = scorer.plan(model, needed(type(method).__name__, data), structure=kept).zeros(kept.layers)
        densities = {one.name: 1 - zeros[one.name] / one.size for one in kept}
    sizes = {one.name: one.size for one in kept}
    return {one.name: max(densities[one.name], 1 / sizes[one.name]) for one in layers}


def _image(owner: str, given: str, data: Batches | None) -> tuple[int, ...]:
    if given:
        return _sizes(owner, given)
    if data is None or not len(data):
        raise DataError(
            f'{owner} counts multiply-adds at a size of images: give image_size, such as "3x32x32", or data with pixel_values.'
        )
    batch = {name: value for name, value in data[0].items() if name != "labels"}
    value = batch.get("pixel_values", next(iter(batch.values())) if len(batch) == 1 else None)
    if value is None or value.ndim < 3:
        raise DataError(f"{owner}: the data has no pixel_values (n, channels, height, width). Give image_size instead.")
    return tuple(value.shape[1:])


def _sizes(owner: str, text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) < 2 or any(not part.isdecimal() or int(part) < 1 for part in parts):
        raise ConfigError(f'{owner}.image_size="{text}": give channels x height x width, such as "3x32x32".')
    return tuple(int(part) for part in parts)


def _reasons(channels: Channels) -> str:
    return "; ".join(f'"{name}": {why}' for name, why in channels.left[:4]) + "."
