"""Several processes under `torchrun`: batches are split, statistics summed, layers solved on different ranks and shared."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import ConfigError
from ..passes import Accumulator, Need, SharedInput

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With `size` 1 every method does nothing, at no cost."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """The process group that is up; alone if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def join(cls, device: torch.device | None = None) -> "Ranks":
        """Join the group that `torchrun` describes in the environment; alone if it does not."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            # ranks wait for as long as rank 0 searches for a plan or saves; the launcher ends them if it fails
            backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=7))
        return cls.current()

    def share_of(self, batches: Sequence[T]) -> list[T]:
        """Every `size`-th batch, from `rank` on. Raises ConfigError if a rank would have none."""
        if len(batches) < self.size:
            raise ConfigError(
                f"{self.size} processes need at least as many calibration batches; there are {len(batches)}."
            )
        return list(batches[self.rank :: self.size])

    def agree(self, groups: list[SharedInput]) -> list[SharedInput]:
        """The same groups of layers on every rank. An expert that no token of one rank reached shares its input with nobody there: such
        layers are solved apart, everywhere, since ranks that sum up different groups would wait for each other forever."""
        mine = {layer.name: index for index, group in enumerate(groups) for layer in group.layers}
        everyones = self.everyones(mine)
        if all(list(other.items()) == list(mine.items()) for other in everyones):
            return groups
        parts: dict[tuple[int, ...], SharedInput] = {}
        for name in everyones[0]:
            layer = next(layer for layer in groups[mine[name]].layers if layer.name == name)
            key = tuple(other[name] for other in everyones)
            if key not in parts:  # each with sums of its own: they are added up in place
                parts[key] = SharedInput([], copy.deepcopy(groups[mine[name]].accumulators))
            parts[key].layers.append(layer)
        return list(parts.values())

    def add_up(self, accumulators: list[Accumulator | None], columns: int, need: Need, device: torch.device) -> None:
        """Sum each accumulator over ranks, in place; an entry stays None only if every rank has None."""
        if self.size == 1:
            return
        for index, mine in enumerate(accumulators):
            one = mine or Accumulator(columns, need, device)
            tokens = torch.tensor(one.tokens, device=device)
            for sums in (tokens, one.squares if one.gram is None else one.gram):
                dist.all_reduce(sums)
            one.tokens = int(tokens)
            accumulators[index] = one if one.tokens else None

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Rank that solves each piece: the dearest first, to whoever has least; the same on every rank."""
        load, owner = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owner[index] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owner[index]] += costs[index]
        return owner

    def share(self, tensor: Tensor, owner: int) -> None:
        """Overwrite `tensor` everywhere by the owner's."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def share_object(self, thing: T, owner: int) -> T:
        """The owner's object on every rank: plain facts of our own making, never data from outside."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, owner)
        return box[0]

    def everyones(self, thing: T) -> list[T]:
        """What every rank gives, in the order of ranks: plain facts of our own making."""
        if self.size == 1:
            return [thing]
        things: list[T | None] = [None] * self.size
        dist.all_gather_object(things, thing)
        return [one for one in things if one is not None]

    def first_alone(self, make: Callable[[], T]) -> T:
        """What `make` returns, on rank 0 before the others: for folders that whoever comes first makes."""
        if self.rank > 0:
            self.wait()
            return make()
        made = make()
        self.wait()
        return made

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()
