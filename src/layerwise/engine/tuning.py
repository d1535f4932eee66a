"""What the walk offers to whoever tunes a solved block before the next one is met: its inputs, what the dense block made of them, and
the solved layers. How it is tuned is not known here (`recover.Reconstruction` is one way).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import WalkError
from ..passes import Pass
from ..passes.paused import tensors_of
from ..structure import Layer
from ..tasks.batches import Batch, Batches
from .events import BlockTuned, LayerSolved

Target = Literal["dense", "same"]


@dataclass(frozen=True)
class SolvedBlock:
    """A block with its new weights, on the device of its turn.

    layers: those that were solved, with their events (codes and factors among them). targets: for each pass, what the dense block gave,
    the tensors that `streams` counts among all of its output.
    """

    name: str
    model: nn.Module
    module: nn.Module
    layers: Sequence[Layer]
    events: Sequence[LayerSolved]
    passes: Sequence[Pass]
    streams: Sequence[int]
    targets: Sequence[list[Tensor]]
    device: torch.device | None
    fresh: bool  # the block changes its inputs in place: it needs copies

    def inputs(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What pass `index` hands to the block, on its device."""
        return self.passes[index].inputs(self.device, fresh=self.fresh)

    def outputs(self, output: object) -> list[Tensor]:
        """Of what the block gives, the tensors that are compared."""
        tensors = tensors_of(output)
        return [tensors[place] for place in self.streams]

    def target(self, index: int) -> list[Tensor]:
        """What those should be."""
        return [one if self.device is None else one.to(self.device) for one in self.targets[index]]

    def batch(self, index: int) -> Batch:
        """The batch that the pass is of."""
        return self.passes[index].batch


class Tuner(Protocol):
    """Changes a solved block in place so that it gives more nearly what the dense block gave.

    target: "dense": what the dense block gave for inputs that no compressed block had touched; it takes a second pass of each batch
    through the dense model. "same": for the inputs that the block really gets.
    """

    @property
    def target(self) -> Target: ...

    def facts(self) -> dict[str, Any]:
        """Everything that the result depends on beside the block, plain values: part of what makes two runs the same."""
        ...

    def check(self, model: nn.Module, data: Batches) -> None:
        """Raise DataError or ConfigError for what would fail at the first block."""
        ...

    def tune(self, block: SolvedBlock) -> tuple[list[LayerSolved], BlockTuned]:
        """Write new weights into the block; returns its layers' events, codes and factors being the new ones, and what came of it."""
        ...


def streams_of(output: object, inputs: object, block: str) -> list[int]:
    """Which of the output's tensors are handed on: those of the shape of an input (hidden states, of image and text where a block has
    both), else the first. Raises WalkError where there is none."""
    tensors = tensors_of(output)
    shapes = {one.shape for one in tensors_of(inputs) if one.is_floating_point()}
    floating = [place for place, one in enumerate(tensors) if one.is_floating_point()]
    if not floating:
        raise WalkError(f'block "{block}" gives no tensor that could be reproduced: go without reconstruction.')
    return [place for place in floating if tensors[place].shape in shapes] or floating[:1]
