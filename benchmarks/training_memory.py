"""What training takes, by torch's own accounting and by arithmetic: weights, gradients, optimiser state, activations that wait."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import layerwise as lw


class Memory:
    """`most`: the most bytes at any time of weights, gradients, optimiser state, and what a forward pass saves for the backward pass."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.most = {"weights": _bytes(model.parameters()), "gradients": 0, "state": 0, "saved": 0}

    def look(self) -> None:
        """After a step, before gradients are dropped."""
        gradients = _bytes(one.grad for one in self.model.parameters() if one.grad is not None)
        state = _bytes(
            value for some in self.optimizer.state.values() for value in some.values() if isinstance(value, Tensor)
        )
        self._keep(gradients=gradients, state=state)

    def saved(self, look: bool = True) -> AbstractContextManager[Any]:
        """Around a forward pass: storages that are no parameter's, each once. look=False: nothing is counted."""
        if not look:
            return nullcontext()
        own = {one.untyped_storage().data_ptr() for one in self.model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                self._keep(saved=sum(found.values()))
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def _keep(self, **now: int) -> None:
        for name, value in now.items():
            self.most[name] = max(self.most[name], value)


def _bytes(tensors: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def expected(model: nn.Module, blocks: int, rank: int, outside: bool) -> tuple[int, int]:
    """Most bytes of gradients and of optimiser state by arithmetic, in float32, for blocks that are alike.

    blocks: trained at a time, 0 for all. rank: 0 for plain Adam, which forgets a block that leaves; in low rank all blocks are kept.
    outside: whether what lies outside the blocks is trained.
    """
    structure = lw.structure_of(model)
    inside = {id(one) for block in structure.blocks for one in model.get_submodule(block.name).parameters()}
    others = sum(one.numel() for one in model.parameters() if id(one) not in inside) if outside else 0
    count = len(structure.blocks)
    block = list(model.get_submodule(structure.blocks[0].name).parameters())
    active = blocks or count
    gradients = 4 * (others + active * sum(one.numel() for one in block))
    states = 0
    for one in block:
        if rank and one.ndim == 2:
            short, long = sorted(one.shape)
            states += 4 * min(rank, short) * (2 * long + short)
        else:
            states += 8 * one.numel()
    return gradients, 8 * others + states * (count if rank else active)
