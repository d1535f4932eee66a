"""What a model is made of: stacks of blocks of layers. Plain records; `find.py` fills them from a model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "conv1d", "conv", "experts", "embedding", "table"]
"""What multiplies its input, and two that do not: "embedding" is looked up; "table" is a raw parameter such as a norm's gain or a
position table. Solvers that need input statistics have none to ask for there."""


@dataclass(frozen=True)
class Layer:
    """One compressible weight, seen as `matrices` matrices of (rows, columns) = (outputs, inputs).

    A linear is one matrix; transformers' Conv1D stores it transposed; a convolution has one per group, its columns being
    (inputs of the group * kernel positions); an experts parameter has one per expert. `name` is the path of the module, or of the
    parameter where one module holds several 3-D weights; `parameter` is the full name in `model.named_parameters()`.
    """

    name: str
    parameter: str
    kind: Kind
    role: str  # q k v qkv o gate up gate_up down fc1 fc2 conv shortcut ... ; outside blocks: stem head embedding router
    shape: tuple[int, ...]  # as stored
    matrices: int
    rows: int
    columns: int
    transposed: bool = False  # stored (..., inputs, outputs): Conv1D, some experts
    block: str | None = None  # the block that holds it; None outside every stack
    tied: tuple[str, ...] = ()  # other parameter names of the same tensor

    @property
    def size(self) -> int:
        """Number of weights, biases not counted."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """One repeated residual unit: a module that is called once in a forward pass. May have no layers of interest."""

    name: str
    stack: str
    index: int  # position in its stack
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind that run in order: a decoder, a vision tower, a ResNet stage."""

    name: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Structure:
    """A model's stacks, the layers outside them, and which layers are up for compression.

    `outside` are compressible weights in no block (embeddings, heads, stems); `left_out` are layers inside blocks that are
    not up for compression (routers, excluded by name), with the reason. Order is the order of modules in the model.
    """

    stacks: tuple[Stack, ...]
    outside: tuple[Layer, ...]  # only those asked for
    left_out: tuple[tuple[Layer, str], ...]
    parameters: int  # of the whole model, tied tensors counted once
    fingerprint: str  # "sha256:..." of parameter names and shapes

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def lone(self) -> tuple[Block, ...]:
        """The modules outside every stack that own layers, each with these as a block of its own (and its only stack)."""
        owned: dict[str, list[Layer]] = {}
        for layer in self.outside:
            owned.setdefault(layer.parameter.rpartition(".")[0], []).append(layer)
        return tuple(Block(path, path, 0, tuple(layers)) for path, layers in owned.items())

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer up for compression, in the order of the model."""
        return (*(layer for block in self.blocks for layer in block.layers), *self.outside)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Modules in blocks that make keys of their own input, in the order of the model: those that may have a KV cache."""
        inside = [layer for block in self.blocks for layer in block.layers] + [layer for layer, _ in self.left_out]
        order = {block.name: index for index, block in enumerate(self.blocks)}
        inside.sort(key=lambda layer: order.get(layer.block or "", len(order)))
        return tuple(dict.fromkeys(layer.name.rpartition(".")[0] for layer in inside if layer.role in ("k", "qkv")))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def layer(self, name: str) -> Layer:
        """The layer of this name. Raises KeyError."""
        return {layer.name: layer for layer in self.layers}[name]
