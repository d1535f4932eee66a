"""Losses over a large vocabulary without its logits in memory: a few rows at a time, their gradients taken at once and kept instead.

Logits of 4 x 2048 tokens over 32000 words are 1 GB in float32, and a divergence needs five tensors of that size. Here a chunk of rows goes
through the head, its loss and the gradients of the hidden state and of the head's weights are computed, and the logits are gone before
the next chunk. The head runs once forward and once backward, as without chunks.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import left_alone
from ..tasks.batches import Batch, call

RowsLoss = Callable[[Tensor, slice], Tensor]
"""(hidden state of some rows, (rows, width); which rows) -> the sum of their losses, a scalar with its graph."""


def summed(loss: RowsLoss, hidden: Tensor, parameters: Sequence[Tensor], rows: int = 1024) -> Tensor:
    """The sum of `loss` over all rows of `hidden`, `rows` at a time. (n, width) -> scalar float32.

    parameters: whatever else `loss` has gradients in, such as the head's weight.
    """
    total: Tensor = _Summed.apply(loss, rows, hidden, *parameters)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: RowsLoss, rows: int, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = [index for index, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        found: list[Tensor | None] = [None] * (1 + len(parameters))
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            with torch.set_grad_enabled(bool(wanted)):
                piece = hidden[part].detach().requires_grad_(0 in wanted)
                value = loss(piece, part)
                total += value.detach()
                if not wanted:
                    continue
                inputs = [piece if index == 0 else parameters[index - 1] for index in wanted]
                gradients = torch.autograd.grad(value, inputs, allow_unused=True)
            for index, gradient in zip(wanted, gradients, strict=True):
                _gather(found, index, gradient, hidden, part)
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        scale = outer[0]
        return None, None, *(None if one is None else one * scale.to(one.dtype) for one in ctx.saved_tensors)


def _gather(found: list[Tensor | None], index: int, gradient: Tensor | None, hidden: Tensor, part: slice) -> None:
    """Rows of the hidden state side by side, everything else summed."""
    if gradient is None:
        return
    if index == 0:
        rows = torch.zeros_like(hidden) if found[0] is None else found[0]
        rows[part] = gradient
        found[0] = rows
    else:
        known = found[index]
        found[index] = gradient if known is None else known.add_(gradient)


@dataclass(frozen=True)
class Head:
    """The last linear of a language model, which nothing follows, and the module whose output it reads."""

    decoder: nn.Module
    linear: nn.Linear

    @property
    def parameters(self) -> list[Tensor]:
        """Weight, and bias where there is one."""
        return [one for one in (self.linear.weight, self.linear.bias) if one is not None]

    @contextmanager
    def hidden(self) -> Iterator[list[Tensor]]:
        """A list that gets the decoder's output, (batch, tokens, width), of every forward pass within."""
        seen: list[Tensor] = []
        handle = self.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            handle.remove()


def head_of(model: nn.Module, batch: Batch) -> Head | None:
    """The head of a causal language model, if logits of this batch are exactly what it makes of the decoder's output.

    None where something follows it (soft caps and scales of some models), where it cannot be left out of the forward pass
    (`logits_to_keep`), and for models of another kind: their logits are computed whole.
    """
    ask, decoder = getattr(model, "get_output_embeddings", None), getattr(model, "get_decoder", None)
    if (
        not callable(ask)
        or not callable(decoder)
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        return None
    try:
        head = Head(decoder(), ask())
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(head.linear, nn.Linear) or not isinstance(head.decoder, nn.Module) or head.decoder is model:
        return None
    first = {name: value[:1] for name, value in batch.items() if name != "labels" and value.ndim}
    with left_alone([model]), torch.no_grad(), head.hidden() as seen:
        logits = getattr(call(model, first), "logits", None)
        if logits is None or len(seen) != 1 or seen[0].ndim != 3:
            return None
        made = head.linear(seen[0])
    return head if made.shape == logits.shape and torch.allclose(made.float(), logits.float(), 1e-4, 1e-5) else None
