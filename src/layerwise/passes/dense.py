"""Statistics of the untouched model, block by block: what scores are made from."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..structure import Block, Layer, Structure
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
    outside: bool = False,
) -> Iterator[tuple[Block, dict[str, list[InputStatistics | None]]]]:
    """Each block in running order with, per layer name, the statistics of its matrices (None: no token came), on the dense model.

    One forward pass; only one block's statistics are held, and its weights are at hand while it is yielded. Layers that share an input
    share the very objects. outside: layers in no block come too, as `Structure.lone`, if a batch reaches them and something is
    multiplied there. Raises WalkError if no batch reaches a block that has layers.
    """
    lone = [replace(one, layers=tuple(layer for layer in one.layers if _multiplies(layer))) for one in structure.lone]
    alone = [one for one in lone if one.layers] if outside else []
    blocks = {block.name: block for block in (*alone, *structure.blocks)}
    wanted = {name for name, block in blocks.items() if block.layers}
    if not wanted:
        return
    with PausedPasses(model, list(blocks), data, forward) as passes:
        for name, standing in passes:
            block = blocks[name]
            with at_hand(model, name, device), Collector(model, block.layers, need, stop_early=False) as collector:
                outputs = [collector.run(one, device) for one in standing]
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
    if missed := wanted & {block.name for block in structure.blocks}:
        raise not_reached(min(missed))


def _multiplies(layer: Layer) -> bool:
    return layer.kind not in ("embedding", "table")
