"""Losses of a model whose weights are moved in one block, without running what comes before it.

One pass of the untouched model records what every block gives. Later passes run the model's own code, but a block that comes before
the moved one gives what was recorded, so only the blocks from there on are computed. No architecture has to be known: masks,
position biases and merged image features are made by the model itself in every pass.

What comes behind the last block, the head and the loss, costs as much as many blocks where the vocabulary is large. With
tail="linear" it runs once a batch: the gradient of the loss with respect to what leaves the blocks tells what a small change there is
worth, to the same order as a central difference, and passes end at the last block.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import ConfigError, LayerwiseError, WalkError
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from ..tasks.undisturbed import Streams, go_back_to, left_alone, random_streams
from .paused import Enough
from .statistics import widest
from .wrapping import Undo, cannot_run, replace_forward

Tail = Literal["linear", "exact"]
TAILS: tuple[Tail, ...] = get_args(Tail)


@dataclass
class Recording:
    """One pass of the untouched model: its loss, and what every block gave, in the order in which they ran.

    slopes: block -> (which tensor of its output, gradient of the loss) for what reaches the loss past all other blocks.
    start, ends: where torch's random streams stood before the pass and behind each block: a model that draws draws the same again.
    """

    index: int  # of the batch
    batch: Batch
    loss: float = float("nan")
    outputs: dict[str, Any] = field(default_factory=dict)
    slopes: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    start: Streams = field(default_factory=random_streams)
    ends: dict[str, Streams] = field(default_factory=dict)

    @property
    def order(self) -> list[str]:
        """The blocks that the batch reached."""
        return list(self.outputs)


class Replays(AbstractContextManager["Replays"]):
    """Passes of `model` that start at any of `blocks` (module names, each called at most once a pass).

    loss: of one batch, a float32 scalar. The model is in eval mode meanwhile, and as it was on leaving, like torch's random streams.
    Memory: what all blocks give for one batch; with tail="linear", while recording, also the gradient of the logits.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], loss: Loss = loss_of, tail: Tail = "linear") -> None:
        if tail not in TAILS:
            raise ConfigError(f'tail="{tail}": give {" or ".join(TAILS)}.')
        self.model, self.blocks, self.loss, self.tail = model, blocks, loss, tail
        self._stack = ExitStack()
        self._step: Callable[[str, Callable[[], Any]], Any] | None = None  # what a call of a block comes to
        self._visited: set[str] = set()
        self._inside: str | None = None

    def __enter__(self) -> "Replays":
        self._stack.enter_context(left_alone([self.model]))
        for name in self.blocks:
            self._stack.callback(self._wrap(name, self.model.get_submodule(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def record(self, batch: Batch, index: int = 0) -> Recording:
        """One pass of the model as it is. Raises what `loss` raises, WalkError if the model cannot run on the batch."""
        recording = Recording(index, batch)
        if self.tail == "exact":
            loss = self._run(recording, partial(self._keep, recording))
            recording.loss = float(loss)
            return recording
        leaves: list[tuple[str, int, Tensor]] = []
        loss = self._run(recording, partial(self._cut, recording, leaves), grad=True)
        recording.loss = float(loss.detach())
        slopes: Sequence[Tensor | None] = ()
        if leaves and loss.requires_grad:
            try:
                slopes = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], allow_unused=True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise WalkError(f'no gradient behind the last block ({reason}): use tail="exact".') from error
        for (name, place, _), slope in zip(leaves, slopes, strict=False):
            if slope is not None:
                recording.slopes.setdefault(name, []).append((place, slope.detach()))
        if not recording.slopes:
            raise WalkError(f'batch {index}: no gradient of the loss reaches what a block gives: use tail="exact".')
        recording.outputs = tree_map_only(Tensor, Tensor.detach, recording.outputs)
        return recording

    def loss_from(self, recording: Recording, block: str | None = None) -> float:
        """The loss of that batch now, with blocks before `block` as they were recorded; None: run all of it, the tail too."""
        if block is None:
            return float(self._run(recording, lambda name, compute: compute()))
        order = recording.order
        before = set(order[: order.index(block)])
        if self.tail == "exact":
            return float(self._run(recording, partial(self._reuse, recording, before)))
        exits = [name for name in order if name in recording.slopes and name not in before]
        if not exits:
            return recording.loss  # nothing from here on reaches the loss
        found = {"change": 0.0}
        self._run(recording, partial(self._weigh, recording, before, exits[-1], found))
        return recording.loss + found["change"]

    def _run(self, recording: Recording, step: Callable[[str, Callable[[], Any]], Any], grad: bool = False) -> Tensor:
        self._step, self._visited, self._inside = step, set(), None
        go_back_to(recording.start)
        try:
            with torch.set_grad_enabled(grad):
                return self.loss(self.model, recording.batch)
        except Enough:
            return torch.tensor(float("nan"))
        except LayerwiseError:
            raise
        except Exception as error:  # the model's own code: any class may come out
            raise cannot_run(error, recording.index, self._inside) from error
        finally:
            self._step = None

    def _wrap(self, name: str, module: nn.Module) -> Undo:
        original = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:  # somebody else's call
                return original(*args, **kwargs)
            if name in self._visited:
                raise WalkError(f'block "{name}" is called twice in one forward pass; shared blocks are not supported.')
            self._visited.add(name)
            self._inside = name
            output = self._step(name, partial(original, *args, **kwargs))
            self._inside = None
            return output

        return replace_forward(module, call)

    # What a block's call comes to: `compute` runs it. Copies are kept and handed out, since a later block may write into them.

    def _keep(self, recording: Recording, name: str, compute: Callable[[], Any]) -> Any:
        output = compute()
        recording.ends[name] = random_streams()
        recording.outputs[name] = tree_map_only(Tensor, Tensor.clone, output)
        return output

    def _cut(
        self, recording: Recording, leaves: list[tuple[str, int, Tensor]], name: str, compute: Callable[[], Any]
    ) -> Any:
        """Blocks run without gradients, and what they give is a leaf: gradients reach it only past all other blocks."""
        with torch.no_grad():
            kept = tree_map_only(Tensor, Tensor.clone, compute())
        recording.ends[name] = random_streams()
        recording.outputs[name] = kept
        for place, tensor in enumerate(tree_flatten(kept)[0]):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                leaves.append((name, place, tensor.requires_grad_()))
        return tree_map_only(Tensor, Tensor.clone, kept)

    def _reuse(self, recording: Recording, before: set[str], name: str, compute: Callable[[], Any]) -> Any:
        if name in before:
            go_back_to(recording.ends[name])
            return tree_map_only(Tensor, Tensor.clone, recording.outputs[name])
        return compute()

    def _weigh(
        self,
        recording: Recording,
        before: set[str],
        last: str,
        found: dict[str, float],
        name: str,
        compute: Callable[[], Any],
    ) -> Any:
        output = self._reuse(recording, before, name, compute)
        if name in recording.slopes and name not in before:
            now, base = tree_flatten(output)[0], tree_flatten(recording.outputs[name])[0]
            for place, slope in recording.slopes[name]:
                found["change"] += _inner(now[place], base[place], slope)
        if name == last:
            raise Enough
        return output


def _inner(now: Tensor, base: Tensor, slope: Tensor) -> float:
    """<now - base, slope>; half precision is left before the subtraction."""
    wide = torch.promote_types(now.dtype, torch.float32)
    return float(((now.to(wide) - base.to(wide)) * slope.to(wide)).sum(dtype=widest(now.device)))
