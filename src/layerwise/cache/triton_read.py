"""Codes, scales and offsets to values in one pass, for CUDA. Needs Triton, which PyTorch's CUDA builds bring: import it where it is used.

The same in tensor operations goes over memory several times; here every code is read once and every value written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CELLS = 4096  # values of one program


def read_into(out: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, *, bits: int, axis: int, group: int) -> None:
    """Fill out (batch, heads, tokens, channels), whose memory may go on after the tokens of a head, as `Planes.read` does.

    packed (batch, heads, tokens, bytes) uint8. scale, offset: float16, (batch, heads, tokens, groups, 1) for groups along axis -1,
    (batch, heads, groups, 1, channels) along -2. Product and sum in float32, one rounding.
    """
    batch, heads, tokens, channels = out.shape
    width = triton.next_power_of_2(channels)
    rows = max(1, _CELLS // width)
    along = group if axis == -1 else 1  # channels that share a scale
    down = 1 if axis == -1 else group  # tokens that do
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _read[(triton.cdiv(tokens, rows), batch * heads)](
            out, packed.contiguous(), scale.contiguous(), offset.contiguous(), tokens, out.stride(1),
            bits=bits, channels=channels, along=along, down=down, rows=rows, width=width,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _read(  # type: ignore[no-untyped-def]
    out, packed, scale, offset, tokens, out_head, bits: tl.constexpr, channels: tl.constexpr, along: tl.constexpr,
    down: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    channel = tl.arange(0, width)[None, :]
    inside = (token < tokens) & (channel < channels)
    per_byte: tl.constexpr = 8 // bits
    row_bytes: tl.constexpr = channels // per_byte
    row_scales: tl.constexpr = channels // along
    byte = tl.load(packed + head * tokens * row_bytes + token * row_bytes + channel // per_byte, mask=inside, other=0)
    code = (byte >> ((channel % per_byte) * bits).to(tl.uint8)) & ((1 << bits) - 1)
    at = head * (tokens // down) * row_scales + token // down * row_scales + channel // along
    step = tl.load(scale + at, mask=inside, other=0).to(tl.float32)
    low = tl.load(offset + at, mask=inside, other=0).to(tl.float32)
    value = code.to(tl.float32) * step + low
    tl.store(out + head * out_head + token * channels + channel, value.to(out.dtype.element_ty), mask=inside)
