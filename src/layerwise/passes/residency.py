"""Where a block's weights are while it works: on the device for its turn, and in memory only then if they are streamed.

A model whose weights are streamed carries its store as the attribute `layerwise_store`; everything that walks over blocks goes
through `at_hand`, so it works on such a model too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError


class Store(Protocol):
    """Holds the weights of blocks that are not in memory. `fingerprint` tells one set of weights from another."""

    fingerprint: str

    def bring(self, block: str) -> None:
        """Fill the block's parameters."""
        ...

    def let_go(self, block: str) -> None:
        """Drop the block's parameters from memory; what was not kept elsewhere is read again next time."""
        ...

    def read(self, parameter: str) -> Tensor:
        """The values of one parameter of a block, from where they are stored; nothing is filled in."""
        ...

    def replace(self, block: str, file: Path) -> None:
        """From now on the block's weights are those of this safetensors file."""
        ...


def store_of(model: nn.Module) -> Store | None:
    """The store of a streamed model; None for a model that is in memory."""
    store: Store | None = getattr(model, "layerwise_store", None)
    return store


def check_whole(model: nn.Module, who: str) -> None:
    """Raise ModelError for a model whose weights are streamed, where `who` needs all of them at once."""
    if store_of(model) is not None or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{who} needs the whole model in memory: load it whole, without streaming.")


def weight_at_hand(model: nn.Module, parameter: str) -> Tensor:
    """The values of one parameter, detached: those in memory, or of a streamed model read from its files, that one alone."""
    found, store = model.get_parameter(parameter), store_of(model)
    return store.read(parameter) if found.is_meta and store is not None else found.detach()


@contextmanager
def at_hand(model: nn.Module, block: str, device: torch.device | None = None) -> Iterator[nn.Module]:
    """The block with its weights in memory and on `device` (None: where it is). Back to where it was afterwards."""
    store = store_of(model)
    module = model.get_submodule(block)
    if store is not None:
        store.bring(block)
    home = next((parameter.device for parameter in module.parameters()), None)
    if device is not None:
        module.to(device)
    try:
        yield module
    finally:
        if device is not None and home is not None:
            module.to(home)
        if store is not None:
            store.let_go(block)
