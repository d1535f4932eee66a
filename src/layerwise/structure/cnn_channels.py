"""The channels of a convolutional network: which must have one width, and what every layer costs at other widths.

Read from a torch.fx trace on the meta device, in evaluation mode: no weight is looked at and nothing is computed. The rules of each
operation are in `channel_rules.py`, the algebra of layouts in `channel_layout.py`. An operation without a rule is refused by name; one
that has a rule but cannot follow (a size written as a number, a parameter of the model's own along the channels) holds its channels at
full width, and `left` says why.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from ..errors import ModelError
from .channel_layout import Layout, Variable, resolved
from .channel_rules import CONVOLUTIONS, TRANSPOSED, Reader, Use

LayerKind = Literal["conv", "depthwise", "transposed", "linear", "norm"]


@dataclass(frozen=True)
class Run:
    """Channels in a row: `inner` for each unit of a group, or `units * inner` that never change (group None)."""

    group: str | None
    units: int
    inner: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Units that share one width. `name` is the layer that first writes them. residual: they meet others at an addition."""

    name: str
    units: int
    residual: bool


@dataclass(frozen=True)
class ChannelLayer:
    """A convolution, linear or norm. Inputs and outputs as runs; a norm and a depthwise convolution touch one row of channels.

    kernel: positions of the kernel. groups: of a convolution that is not depthwise. positions: of the output (of a transposed
    convolution: of the input), over all calls, for one image.
    """

    name: str
    kind: LayerKind
    inputs: tuple[Run, ...]
    outputs: tuple[Run, ...]
    kernel: int = 1
    groups: int = 1
    positions: int = 1

    def weights(self, inputs: int, outputs: int) -> int:
        """Of the weight alone at these widths, biases not counted; norms have none."""
        if self.kind == "norm":
            return 0
        return self.kernel * outputs * (1 if self.kind == "depthwise" else inputs // self.groups)

    def multiply_adds(self, inputs: int, outputs: int) -> int:
        """For one image at these widths."""
        return self.weights(inputs, outputs) * self.positions


@dataclass(frozen=True)
class Channels:
    """The groups that may change, the layers in running order, and what is held at full width with the reason."""

    groups: tuple[ChannelGroup, ...]
    layers: tuple[ChannelLayer, ...]
    left: tuple[tuple[str, str], ...]
    image: tuple[int, ...]  # channels, height, width of the input that positions were counted for

    @property
    def widths(self) -> dict[str, int]:
        """Group -> units of the model as it is."""
        return {group.name: group.units for group in self.groups}

    def parameters(self, widths: dict[str, int]) -> int:
        """Weights of convolutions and linears at these widths; groups that are not named keep theirs."""
        return sum(one.weights(*self.sizes(one, widths)) for one in self.layers)

    def multiply_adds(self, widths: dict[str, int]) -> int:
        """For one image at these widths."""
        return sum(one.multiply_adds(*self.sizes(one, widths)) for one in self.layers)

    def sizes(self, layer: ChannelLayer, widths: dict[str, int]) -> tuple[int, int]:
        """(inputs, outputs) of a layer at these widths."""
        return size_of(layer.inputs, widths), size_of(layer.outputs, widths)


def size_of(runs: Sequence[Run], widths: dict[str, int]) -> int:
    """Channels of these runs when groups have these widths."""
    return sum((run.units if run.group is None else widths.get(run.group, run.units)) * run.inner for run in runs)


def cnn_channels(model: nn.Module, image: Sequence[int]) -> Channels:
    """The channels of `model` on images of (channels, height, width) `image`.

    The input's channels and the outputs never change. Raises ModelError, naming the module or operation, for a model that cannot be traced
    or an operation whose effect on channels is not known.
    """
    _check_weights(model)
    plain = copy.deepcopy(model).to("meta", torch.float32).eval()
    if not image or min(image) < 1:
        raise ModelError(f"an image of {tuple(image)}: give channels, height and width, each at least 1.")
    try:
        traced = symbolic_trace(_OneImage(plain))
    except Exception as error:  # the model's own code: any class may come out
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be traced: {first} Channels are read from a torch.fx trace, which takes no code that decides"
            " by values or calls with other inputs than one image."
        ) from error
    reader = Reader(traced)
    try:
        reader.run(torch.empty(2, *image, device="meta"))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on an image of {'x'.join(map(str, image))}: {str(error).splitlines()[0]}"
        ) from error
    if not any(use.kind != "norm" for use in reader.uses.values()):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer.")
    return _records(reader, tuple(image))


class _OneImage(nn.Module):
    """The model with everything but the image left at its default."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> object:
        return self.model(image)


def _records(reader: Reader, image: tuple[int, ...]) -> Channels:
    names: dict[Variable, str] = {}
    left: dict[str, str] = {}
    taken: dict[str, int] = {}
    for use in reader.uses.values():
        for variable, _ in resolved(use.outputs):
            if variable in names or use.kind == "norm":
                continue
            if variable.fixed:
                left.setdefault(use.name, "; ".join(variable.reasons))
                continue
            taken[use.name] = taken.get(use.name, 0) + 1
            names[variable] = use.name if taken[use.name] == 1 else f"{use.name}#{taken[use.name]}"
    layers = tuple(_layer(use, names) for use in reader.uses.values())
    groups = tuple(ChannelGroup(name, variable.size, variable.residual) for variable, name in names.items())
    return Channels(groups, layers, tuple(left.items()), image)


def _layer(use: Use, names: dict[Variable, str]) -> ChannelLayer:
    return ChannelLayer(
        use.name,
        use.kind,
        _runs(use.inputs, names),
        _runs(use.outputs, names),
        use.kernel,
        use.groups,
        use.positions,
    )


def _runs(layout: Layout, names: dict[Variable, str]) -> tuple[Run, ...]:
    return tuple(Run(None if one.fixed else names[one], one.size, inner) for one, inner in resolved(layout))


def _check_weights(model: nn.Module) -> None:
    """Raise ModelError for weights that are computed from others or shared between layers: their sizes are not one layer's to change."""
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            continue
        if nn.utils.parametrize.is_parametrized(module) or not isinstance(
            module._parameters.get("weight"), nn.Parameter
        ):
            raise ModelError(f'"{name}": its weight is computed from others (parametrized). Remove that first.')
        other = seen.setdefault(id(module.weight), name)
        if other != name:
            raise ModelError(f'"{name}" and "{other}" share one weight: channels of such layers cannot change.')
