"""Round-to-nearest quantisation of keys and values, and codes of 2, 4 and 8 bits packed into bytes.

The offset is the group's minimum, a float, as in KIVI (Liu et al. 2024, arXiv:2402.02750) and in the KVTuner paper (Li et al. 2025,
arXiv:2502.04420). KVTuner's code rounds it to a whole number of steps, so that the minimum is not on the grid: `quantize_reference`
does that, to replay its numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

BITS = (2, 4, 8)  # that are packed; 16 means left as it is
STORED = (
    torch.float16
)  # scales and offsets: 11 bits of mantissa, where bfloat16's 8 would cost as much as half a step of 8 bits
_LEAST_RANGE = 1e-5  # of a group: a constant one still has a scale, and in STORED it is not 0


@dataclass(frozen=True)
class Quantized:
    """A tensor on a grid: value = code * scale + offset, one scale and offset for `group` consecutive entries of `axis`.

    codes: uint8, 0 .. 2**bits - 1, of the tensor's shape. scale, offset: float32; their shape is the tensor's with `axis` (negative)
    in two, (groups, 1).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    axis: int
    group: int

    def values(self) -> Tensor:
        """The tensor back, float32."""
        grouped: Tensor = self.codes.unflatten(self.axis, (-1, self.group))  # type: ignore[no-untyped-call]
        return grouped.float().mul_(self.scale).add_(self.offset).flatten(self.axis - 1, self.axis)


def quantize(
    x: Tensor, bits: int, *, axis: int = -1, group: int | None = None, stored: torch.dtype | None = STORED
) -> Quantized:
    """Asymmetric, offset = minimum, scale = (maximum - offset) / (2**bits - 1); computed in float32 whatever the dtype of x.

    axis: the groups lie along it, -1 (channels of a token) or -2 (tokens of a channel) for keys and values (batch, heads, tokens,
    channels). group: entries of a group, None for the whole axis. stored: what scale and offset are rounded to, None for not at all;
    codes are chosen after that rounding, so the error is at most scale / 2 but for the rounding at both ends of the range.
    Raises ConfigError for bits other than 2, 4, 8, ShapeError for a group that does not divide the axis.
    """
    grouped, size = _grouped(x, bits, axis, group)
    low, high = grouped.aminmax(dim=axis, keepdim=True)
    offset = _rounded(low, stored)
    scale = _rounded((high - offset).clamp_min_(_LEAST_RANGE) / (2**bits - 1), stored)
    codes = ((grouped - offset) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return Quantized(codes.flatten(axis - 1, axis), scale, offset, bits, axis, size)


def quantize_reference(x: Tensor, bits: int, *, axis: int = -1, group: int | None = None) -> Quantized:
    """The official code's grid: a whole zero point, so multiples of the scale. Arguments and errors as of `quantize`.

    With its names, z = round(min / scale) + 2**(bits - 1) and q = round(x / scale - z): here code = q + 2**(bits - 1) and
    offset = round(min / scale) * scale. Nothing is rounded to 16 bits.
    """
    grouped, size = _grouped(x, bits, axis, group)
    low, high = grouped.aminmax(dim=axis, keepdim=True)
    scale = (high - low).clamp_min_(_LEAST_RANGE) / (2**bits - 1)
    steps = (low / scale).round_()
    codes = (grouped / scale - steps).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return Quantized(codes.flatten(axis - 1, axis), scale, steps * scale, bits, axis, size)


def check_bits(bits: int, what: str = "bits") -> None:
    """Raise ConfigError unless these are bits that are packed."""
    if bits not in BITS:
        raise ConfigError(f"{what}={bits}: give 2, 4 or 8 (16 leaves keys or values as they are).")


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes below 2**bits -> (..., n * bits / 8) bytes, the first code of a byte in its lowest bits.

    Raises ShapeError unless they fill whole bytes.
    """
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ShapeError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes. Take more bits, or 16.")
    parts = codes.unflatten(-1, (-1, per_byte))  # type: ignore[no-untyped-call]
    packed: Tensor = parts[..., 0].clone()
    for place in range(1, per_byte):
        packed.bitwise_or_(parts[..., place] << place * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` was given. Bits are spread inside wider whole numbers, all codes of a byte at once."""
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.to(torch.int16)
        wide = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
    else:
        wide = packed.to(torch.int32)
        wide = wide.bitwise_or_(wide << 12).bitwise_and_(0x000F000F)
        wide = wide.bitwise_or_(wide << 6).bitwise_and_(0x03030303)
    return wide.view(torch.uint8)  # the lowest bits come first: every device of torch but s390x is little-endian


def _grouped(x: Tensor, bits: int, axis: int, group: int | None) -> tuple[Tensor, int]:
    """(x in float32 with `axis` in two (groups, group), size of a group)."""
    check_bits(bits)
    if axis >= 0:
        raise ConfigError(f"axis={axis}: count from the end, -1 for channels, -2 for tokens.")
    size = x.shape[axis] if group is None else group
    if size < 1 or x.shape[axis] % size:
        raise ShapeError(f"{x.shape[axis]} entries do not split into groups of {size}. Take a group that divides them.")
    return x.float().unflatten(axis, (-1, size)), size  # type: ignore[no-untyped-call]


def _rounded(x: Tensor, stored: torch.dtype | None) -> Tensor:
    return x if stored is None else x.to(stored).float()
