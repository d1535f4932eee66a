"""Statistics of the untouched model, block by block: what scores are made from."""

from collections.abc import Iterator

import torch
from torch import nn

from ..structure import Block, Structure
from ..tasks.batches import Batches, call
from .collect import Collector
from .paused import Forward, PausedPasses
from .residency import at_hand
from .statistics import InputStatistics, Need
from .wrapping import not_reached


def collect_dense(
    model: nn.Module,
    structure: Structure,
    data: Batches,
    need: Need = "squares",
    *,
    device: torch.device | None = None,
    forward: Forward = call,
) -> Iterator[tuple[Block, dict[str, list[InputStatistics | None]]]]:
    """Each block in running order with, per layer name, the statistics of its matrices (None: no token came), on the dense model.

    One forward pass; only one block's statistics are held, and its weights are at hand while it is yielded. Layers that share an input
    share the very objects. Raises WalkError if no batch reaches a block that has layers.
    """
    blocks = {block.name: block for block in structure.blocks}
    wanted = {name for name, block in blocks.items() if block.layers}
    with PausedPasses(model, list(blocks), data, forward) as passes:
        for name, standing in passes:
            block = blocks[name]
            with at_hand(model, name, device), Collector(model, block.layers, need, stop_early=False) as collector:
                outputs = []
                for one in standing:
                    collector.begin(one)
                    outputs.append(one.run(device))
                if block.layers:
                    by_layer = {
                        layer.name: statistics
                        for group in collector.groups()
                        for statistics in [group.statistics()]
                        for layer in group.layers
                    }
                    yield block, by_layer
            wanted.discard(name)
            if not wanted:
                return
            for one, output in zip(standing, outputs, strict=True):
                one.go_on(output)
            del outputs
    if wanted:
        raise not_reached(min(wanted))
