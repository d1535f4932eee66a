"""Which blocks the data comes to: text alone never runs the vision tower of a LLaVA."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from ..structure import Structure
from ..tasks.batches import Batch, call
from ..tasks.undisturbed import undisturbed
from .wrapping import running


def reached_blocks(model: nn.Module, structure: Structure, data: Sequence[Batch]) -> set[str]:
    """The names of the blocks that run, by forward passes of the batches up to the first after which all have: mostly one.

    Raises WalkError naming the batch that the model cannot run on.
    """
    with undisturbed([model]), reached(model, structure) as found:
        for index, batch in enumerate(data):
            if len(found) < len(structure.blocks):
                with running(index):
                    call(model, batch)
    return found


@contextmanager
def reached(model: nn.Module, structure: Structure) -> Iterator[set[str]]:
    """The names of the blocks that run within. One may run and yet have no gradient, as LLaVA's last vision block."""
    found: set[str] = set()
    handles = []
    try:
        for block in structure.blocks:
            handles.append(model.get_submodule(block.name).register_forward_pre_hook(partial(_note, found, block.name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(found: set[str], block: str, *_: object) -> None:
    found.add(block)
