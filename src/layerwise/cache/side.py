"""The keys, or the values, of one layer: codes that only ever grow, and the recent tokens as they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StatisticsError
from .quantizers import STORED
from .scheme import Grouping
from .storage import TOKENS, Parts, layout_of

_ROOM = 32  # tokens


class Side:
    """(batch, heads, tokens, channels), in two parts. All tensors own their memory: none is a view of a longer one.

    parts: codes, scales and offsets, as the layout has them; empty until something is quantised. recent (batch, heads, other tokens,
    channels): in the model's dtype; the only part when bits is 16. name: for messages.
    """

    def __init__(self, bits: int, grouping: Grouping, like: Tensor, name: str) -> None:
        self.bits, self.grouping, self.name = bits, grouping, name
        self.layout = layout_of(bits, grouping, like)
        self.parts: Parts = ()
        self.recent = like.new_empty((*like.shape[:TOKENS], 0, like.shape[-1]))

    @property
    def coded(self) -> int:
        """Tokens that are held as codes."""
        return self.parts[0].shape[TOKENS] if self.parts else 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.coded + self.recent.shape[TOKENS]

    @property
    def elements(self) -> int:
        """Numbers in all tokens."""
        return self.recent.shape[0] * self.tokens * self.width

    @property
    def width(self) -> int:
        """Numbers in one token of one sequence."""
        return self.recent.shape[1] * self.recent.shape[3]

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [*self.parts, self.recent]

    def add(self, new: Tensor, *, first: bool, hold: bool) -> Tensor:
        """Take `new` tokens in; returns all (batch, heads, tokens, channels) to attend to, in the dtype of `new`.

        first: quantise before that, so that the new tokens are attended to as they are stored. hold: some of the new tokens may be taken
        back; until the next call nothing is written, so that `crop` leaves no trace of them. The first of them is no draft, and those after
        it, up to what may wait, fill no group that is attended to: what the others are given does not depend on drafts.
        """
        grouping = self.grouping
        hold = hold and not (first and grouping.at_once)  # each token has scales of its own: `crop` is exact as it is
        if hold:
            self.settle()
        waiting = new if not self.recent.shape[TOKENS] else torch.cat([self.recent, new], dim=TOKENS)
        mine, before = waiting is not new, self.parts
        if first:
            drafts = min(max(new.shape[TOKENS] - 1, 0), grouping.keep + grouping.unit) if hold else 0
            self._take(waiting, mine=mine, drafts=drafts)
            every = self._joined(self.recent)
        else:
            every = self._joined(waiting)
        if hold:
            self.parts, self.recent = before, waiting if mine else _owned(waiting)
        elif not first:
            self._take(waiting, mine=mine)
        return every

    def settle(self) -> None:
        """Quantise what is due of the recent tokens."""
        self._take(self.recent)

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens`. Where that cuts a group of tokens, the rest of it goes back to the recent ones, as it was read: of what
        is written (`add` holds what may be taken back) nothing better is known."""
        left = self.tokens - tokens
        if left >= self.coded:
            self.recent = _owned(self.recent.narrow(TOKENS, 0, left - self.coded))
            return
        unit = self.grouping.unit if self.grouping.axis == -TOKENS else 1  # else every token has scales of its own
        coded, whole = self.coded, left // unit * unit
        rest = self.recent if left == whole else self.layout.read(self.parts, 0, self.recent)
        self.recent = _owned(rest.narrow(TOKENS, min(whole, rest.shape[TOKENS]), left - whole))
        self._map(lambda part: _owned(part.narrow(TOKENS, 0, part.shape[TOKENS] * whole // coded)))

    def select(self, rows: Tensor) -> None:
        """Sequences `rows` of the batch, in that order; one may come several times."""
        rows = rows.to(self.recent.device)
        self.recent = self.recent[rows]
        self._map(lambda part: part[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change codes, scales and offsets alike, if there are any."""
        changed = tuple(change(part) for part in self.parts)
        self.parts = changed if changed and changed[0].shape[TOKENS] else ()

    def _take(self, waiting: Tensor, *, mine: bool = True, drafts: int = 0) -> None:
        """Of the tokens that wait quantise what is due; the others are the recent ones. mine: nobody else holds this tensor. drafts: so
        many of the last tokens do not count."""
        total = self.coded + waiting.shape[TOKENS] - drafts
        due = 0 if self.bits == 16 else self.grouping.quantized(total) - self.coded
        if due <= 0:
            self.recent = waiting if mine else _owned(waiting)
            return
        self._append(waiting.narrow(TOKENS, 0, due))
        self.recent = _owned(waiting.narrow(TOKENS, due, waiting.shape[TOKENS] - due))

    def _append(self, states: Tensor) -> None:
        parts, finite = self.layout.write(states.detach())  # the past carries no gradient
        asked = states.device.type == "cpu" or states.shape[TOKENS] > 1  # else every step waits for the accelerator
        if asked and not finite.isfinite().all():
            raise StatisticsError(
                f"{self.name}: a number is not finite, or larger than 16 bits hold ({torch.finfo(STORED).max:.0f})."
                " Check the weights for NaN, or leave this layer at 16 bits."
            )
        held = self.parts
        self.parts = tuple(torch.cat(pair, dim=TOKENS) for pair in zip(held, parts, strict=True)) if held else parts

    def _joined(self, rest: Tensor) -> Tensor:
        """The coded tokens and then the rest, in the dtype of `rest`."""
        coded, more = self.coded, rest.shape[TOKENS]
        if not coded:
            return rest
        # room in steps, so that an allocator gives the same memory again in step after step
        every = self.layout.read(self.parts, -(-more // _ROOM) * _ROOM, rest)
        every.narrow(TOKENS, coded, more).copy_(rest)
        return every.narrow(TOKENS, 0, coded + more)


def _owned(part: Tensor) -> Tensor:
    """A copy with memory of its own size."""
    return part.clone(memory_format=torch.contiguous_format)
