"""Layers in groups that share one decision: each alone, those of a block, those of a tower."""

from typing import Literal

from .parts import Layer, Stack, Structure

Granularity = Literal["layer", "block", "tower"]


def groups_of(structure: Structure, by: Granularity) -> dict[str, tuple[Layer, ...]]:
    """Name of the group -> its layers up for compression, in the order of the model; groups without any are left out.

    Layers outside the blocks are in no block or tower: only by="layer" has them.
    """
    if by == "layer":
        return {layer.name: (layer,) for layer in structure}
    if by == "block":
        groups = {block.name: block.layers for block in structure.blocks}
    else:
        groups = {
            name: tuple(layer for stack in stacks for block in stack.blocks for layer in block.layers)
            for name, stacks in towers_of(structure).items()
        }
    return {name: layers for name, layers in groups.items() if layers}


def towers_of(structure: Structure) -> dict[str, tuple[Stack, ...]]:
    """The parts of a model that hold its stacks, cut where their paths part: vision tower and language model, encoder and decoder.

    An encoder-decoder inside a larger model is one tower of that. A model of one stack is one tower.
    """
    paths = [stack.name.split(".") for stack in structure.stacks]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    towers: dict[str, tuple[Stack, ...]] = {}
    for stack, path in zip(structure.stacks, paths, strict=True):
        name = ".".join(path[: shared + 1]) if len(paths) > 1 else stack.name
        towers[name] = (*towers.get(name, ()), stack)
    return towers
