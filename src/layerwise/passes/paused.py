"""Paused forward passes: every batch is a forward pass of the real model, standing in front of the same block.

The `forward` of each block is wrapped for the duration. Each batch runs the model's own forward in a greenlet; when it
reaches a block it waits there. Whoever holds the passes runs the block on each of them as often as needed and lets them go on
with an output of its choice. What the model does between blocks (masks, position biases, merging image features into text,
encoder to decoder) is the model's own code running, so no architecture has to be known.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import LayerwiseError, WalkError
from ..tasks.batches import Batch, call
from .spill import Spill, spill_of
from .wrapping import cannot_run, replace_forward, set_eval

T = TypeVar("T")
Forward = Callable[[nn.Module, Batch], object]
Arguments = Callable[[tuple[Any, ...], dict[str, Any]], None]  # is handed those of a call
_Command = Callable[["Pass"], Any] | None  # what a waiting pass is told to do; None: go on


class Enough(BaseException):
    """Raised by a hook that has seen all it needs: the rest of the block need not be computed."""


@dataclass
class Pass:
    """One batch on its way through the model, waiting in front of `block`."""

    index: int  # of its batch
    batch: Batch
    runner: greenlet
    block: str | None = None  # None: finished
    forward: Callable[..., Any] | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    outcome: Any = None
    wrote: bool = False  # the last run changed its arguments in place
    visited: set[str] = field(default_factory=set)
    spill: Spill | None = None  # where its tensors are while it waits; None: in memory

    def run(self, device: torch.device | None = None, *, fresh: bool = False, watch: Arguments | None = None) -> Any:
        """The block's output for this pass, computed inside the pass; the pass keeps waiting. None if a hook had Enough.

        device: where the block is, if the model itself lives elsewhere; the output comes back to where the arguments are.
        fresh: hand the block copies of its arguments. A block that changes them in place (`wrote` says so afterwards) must
        always be run so, or its second run would see the traces of the first. watch: is handed the arguments first, as a hook
        of the block would be; hooks of modules inside it run by themselves, those of the block itself do not.
        """

        def command(waiting: "Pass") -> Any:
            assert waiting.forward is not None  # noqa: S101  (a pass that waits has a block)
            args, kwargs = waiting.inputs(device, fresh=fresh)
            home = _device_of(waiting.arguments)
            moved = device is not None and home is not None and device != home
            before = [tensor._version for tensor in tensors_of((args, kwargs))]
            try:
                if watch is not None:
                    watch(args, kwargs)
                output = waiting.forward(*args, **kwargs)
            except Enough:
                output = None
            self.wrote = [tensor._version for tensor in tensors_of((args, kwargs))] != before
            output = _to(output, home) if moved else output
            if self.spill is not None:
                self.spill.keep(output)
            return output

        with torch.no_grad():
            return self.runner.switch(command)

    def inputs(
        self, device: torch.device | None = None, *, fresh: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it hands to the block it waits at, on the device; fresh: copies where they are there already."""
        args, kwargs = self.arguments
        home = _device_of(self.arguments)
        if device is not None and home is not None and device != home:
            return _to((args, kwargs), device)
        return tree_map_only(Tensor, Tensor.clone, (args, kwargs)) if fresh else (args, kwargs)

    def go_on(self, output: Any) -> None:
        """Leave the block with this output and run to the next block, or to the end of the model."""
        self.outcome, self.arguments, self.forward = output, ((), {}), None
        self.block = None
        with torch.no_grad():
            self.runner.switch(None)


class PausedPasses(AbstractContextManager["PausedPasses"]):
    """Passes of all `batches` through `model`, stopped at each of `blocks` (module names, each called at most once a pass).

    Iterating yields (block name, the passes that stand there); the caller must let every one of them go on before the next.
    Where passes stand at different blocks, the block that comes first in `blocks` is next. Ends when all passes have
    finished; leaving the context abandons what is under way and restores the model. Passes run without gradients.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], forward: Forward = call
    ) -> None:
        self.model, self.order, self.batches, self.forward = (
            model,
            {name: i for i, name in enumerate(blocks)},
            batches,
            forward,
        )
        self.spill = spill_of(model)
        self.passes: list[Pass] = []
        self.done: set[str] = set()
        self._restore: list[Callable[[], None]] = []
        self._by_runner: dict[greenlet, Pass] = {}

    def __enter__(self) -> "PausedPasses":
        self._restore.append(set_eval(self.model))
        if self.spill is not None:
            self.spill.leave([*tensors_of(list(self.batches)), *self.model.buffers()])
        for name in self.order:
            self._restore.append(self._wrap(name, self.model.get_submodule(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.passes:
            if not one.runner.dead:
                one.runner.throw(GreenletExit)
        for undo in reversed(self._restore):
            undo()
        self.passes, self._restore, self._by_runner = [], [], {}

    def __iter__(self) -> Iterator[tuple[str, list[Pass]]]:
        for index in range(len(self.passes), len(self.batches)):
            self._start(index)
        while waiting := [one for one in self.passes if one.block is not None]:
            name = min((one.block for one in waiting if one.block is not None), key=self.order.__getitem__)
            if name in self.done:
                raise WalkError(
                    f'"{name}" was reached again after it was finished: batches take it in different orders.'
                )
            self.done.add(name)
            standing = [one for one in waiting if one.block == name]
            yield name, standing
            if stuck := [one.index for one in standing if one.block == name]:
                raise WalkError(f'passes {stuck[:3]} were left waiting at "{name}"')

    def first(self) -> Pass:
        """The pass of the first batch, in front of its first block: what the others will look like, before they are made."""
        return self.passes[0] if self.passes else self._start(0)

    def _start(self, index: int) -> Pass:
        one = Pass(index, self.batches[index], greenlet(self._whole), spill=self.spill)
        self._by_runner[one.runner] = one
        self.passes.append(one)
        with torch.no_grad():
            one.runner.switch(one)
        return one

    def _whole(self, one: Pass) -> None:
        try:
            self.forward(self.model, one.batch)
        except LayerwiseError:
            raise
        except Exception as error:  # the model's own code: any class may come out
            raise cannot_run(error, one.index, one.block) from error
        one.block, one.arguments = None, ((), {})

    def _wrap(self, name: str, module: nn.Module) -> Callable[[], None]:
        original = module.forward

        def wait(*args: Any, **kwargs: Any) -> Any:
            one = self._by_runner.get(getcurrent())
            if one is None:  # somebody else's call of the same module
                return original(*args, **kwargs)
            if name in one.visited:
                raise WalkError(f'block "{name}" is called twice in one forward pass; shared blocks are not supported.')
            one.visited.add(name)
            one.block, one.forward, one.arguments = name, original, (args, kwargs)
            del args, kwargs  # the pass holds them until it goes on, then nobody does
            if one.spill is not None:
                one.spill.keep(one.arguments)
            command: _Command = one.runner.parent.switch()
            while command is not None:
                command = one.runner.parent.switch(command(one))
            output, one.outcome = one.outcome, None
            return output

        return replace_forward(module, wait)


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in a tree of lists, tuples and dictionaries, in order."""
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _device_of(tree: Any) -> torch.device | None:
    return next((tensor.device for tensor in tensors_of(tree)), None)


def _to(tree: T, device: torch.device | None) -> T:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)  # type: ignore[no-any-return]
