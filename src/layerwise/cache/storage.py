"""How the codes of one side of a layer lie in memory, and how all of them are read at once: what a decoding step waits for.

Both layouts take the same bytes. `Rows` is read by the loop that PyTorch has for quantised embeddings (FBGEMM's on x86): on a CPU one
pass over the codes, four times as fast as tensor operations and equal to the last bit. `Planes` is for everything else; on CUDA a
Triton kernel reads it in one pass.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .quantizers import STORED, pack, quantize, unpack
from .scheme import Grouping

TOKENS = 2  # the axis of tokens, in every part
Parts = tuple[Tensor, ...]  # what is held; all grow along the tokens
_SCALES = 2 * STORED.itemsize  # bytes of the scale and the offset of a group


class Layout(Protocol):
    """Turns states into parts and back."""

    def write(self, states: Tensor) -> tuple[Parts, Tensor]:
        """The parts of these (batch, heads, tokens, channels), and a tensor that is finite if all scales and offsets are."""

    def read(self, parts: Parts, room: int, like: Tensor) -> Tensor:
        """(batch, heads, tokens + room, channels) in the dtype of `like`; what is in the last `room` tokens is not defined."""


def layout_of(bits: int, grouping: Grouping, like: Tensor) -> Layout:
    """The faster one for states such as `like` (batch, heads, tokens, channels)."""
    filled = grouping.group * bits % 16 == 0  # codes of a group are whole 16-bit words, so that its scale lies on one
    if grouping.axis == -1 and bits < 8 and filled and like.device.type == "cpu" and _reads_rows(bits):
        return Rows(bits, grouping.group)
    return Planes(bits, grouping.axis, grouping.group)


class Rows:
    """Groups of channels, each its codes, scale and offset in one row of bytes: (batch, heads, tokens, groups x bytes of a row)."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group
        self.bytes = group * bits // 8 + _SCALES

    def write(self, states: Tensor) -> tuple[Parts, Tensor]:
        found = quantize(states, self.bits, group=self.group)
        codes = pack(found.codes, self.bits).unflatten(-1, (-1, self.bytes - _SCALES))  # type: ignore[no-untyped-call]
        beside = (one.to(STORED).view(torch.uint8) for one in (found.scale, found.offset))
        return (torch.cat([codes, *beside], dim=-1).flatten(-2),), found.scale + found.offset

    def read(self, parts: Parts, room: int, like: Tensor) -> Tensor:
        """See `Layout.read`; one pass over the rows."""
        (held,) = parts
        batch, heads, tokens, width = held.shape
        rows = held
        if room:  # rows of any content for the tokens that follow: cheaper than to move what was read
            rows = held.new_empty(batch, heads, tokens + room, width)
            rows.narrow(TOKENS, 0, tokens).copy_(held)
        return _unpack_rows(rows.view(-1, self.bytes), self.bits).view(batch, heads, tokens + room, -1).to(like.dtype)


class Planes:
    """Codes (batch, heads, tokens, bytes), scales and offsets (as of `Quantized`, 16 bits) apart; groups along either axis."""

    def __init__(self, bits: int, axis: int, group: int) -> None:
        self.bits, self.axis, self.group = bits, axis, group

    def write(self, states: Tensor) -> tuple[Parts, Tensor]:
        found = quantize(states, self.bits, axis=self.axis, group=self.group)
        parts = (pack(found.codes, self.bits), found.scale.to(STORED), found.offset.to(STORED))
        return parts, found.scale + found.offset

    def read(self, parts: Parts, room: int, like: Tensor) -> Tensor:
        """See `Layout.read`; by Triton on CUDA where it can."""
        packed, scale, offset = parts
        batch, heads, tokens, width = packed.shape
        every = like.new_empty(batch, heads, tokens + room, width * 8 // self.bits)
        out = every.narrow(TOKENS, 0, tokens)
        if out.is_cuda:
            self._read_cuda(packed, scale, offset, out)
            return every
        # three passes over contiguous numbers: on a CPU twice as fast as one expression of three broadcast tensors
        exact = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        exact.copy_(unpack(packed, self.bits))
        self._grouped(exact).mul_(scale.float()).add_(offset.float())
        if exact is not out:  # one rounding
            out.copy_(exact)
        return every

    def _read_cuda(self, packed: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
        if _triton_reads(self.bits, self.axis, self.group):
            from .triton_read import read_into

            read_into(out, packed, scale, offset, bits=self.bits, axis=self.axis, group=self.group)
        else:
            self.read_by_tensors(packed, scale, offset, out)

    def read_by_tensors(self, packed: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
        """Product and sum in float32, one rounding. out: (batch, heads, tokens, channels)."""
        codes = self._grouped(unpack(packed, self.bits))
        self._grouped(out).copy_(torch.addcmul(offset.float(), codes, scale.float()))

    def _grouped(self, part: Tensor) -> Tensor:
        split: Tensor = part.unflatten(self.axis, (-1, self.group))  # type: ignore[no-untyped-call]
        return split


def _unpack_rows(rows: Tensor, bits: int) -> Tensor:
    """(rows, bytes) of codes, scale and offset -> (rows, group) float32."""
    ops = torch.ops.quantized
    read: Tensor = (ops.embedding_bag_4bit_unpack if bits == 4 else ops.embedding_bag_2bit_unpack)(rows)
    return read


@cache
def _triton_reads(bits: int, axis: int, group: int) -> bool:
    """Whether Triton is there, can build the kernel (it needs a C compiler when it runs), and the kernel reads as it should."""
    planes, tokens, channels = Planes(bits, axis, group), 3 * (group if axis == -2 else 1), 2 * group
    states = torch.arange(2 * tokens * channels, device="cuda").view(1, 2, tokens, channels).sin() * 4
    (packed, scale, offset), _ = planes.write(states)
    plain, read = torch.empty_like(states), torch.empty_like(states)
    planes.read_by_tensors(packed, scale, offset, plain)
    try:
        from .triton_read import read_into

        read_into(read, packed, scale, offset, bits=bits, axis=axis, group=group)
    except Exception:  # whatever its compiler raises; tensor operations do the same
        return False
    return torch.allclose(read, plain, atol=1e-5)


@cache
def _reads_rows(bits: int) -> bool:
    """Whether this build of PyTorch has the loop, and it reads as it should."""
    codes = torch.arange(16, dtype=torch.uint8)[None] % 2**bits
    beside = torch.tensor([[0.5, -3.0]], dtype=STORED).view(torch.uint8)
    try:
        read = _unpack_rows(torch.cat([pack(codes, bits), beside], dim=-1), bits)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(read, codes * 0.5 - 3)
