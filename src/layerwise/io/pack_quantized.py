"""One layer's codes as compressed-tensors' `pack-quantized` stores them, and back.

`weight_packed` (rows, words) int32 has the codes, `weight_scale` (rows, groups) the scales, `weight_shape` the two sizes, and where the
scheme is asymmetric `weight_zero_point` (words of rows, groups) int32 has the codes that mean 0, packed along the rows. A reader computes
(code - zero) * scale in the dtype of the model: rounded once, so it gets the very weights that `Codes.weight()` rounded to it are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ModelError
from ..solvers.codes import Codes
from .packing import pack, unpack, words_of

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
MOST_BITS = 8


@dataclass(frozen=True)
class Scheme:
    """What layers must have in common to be stored in one group of the config. group None: one scale per row."""

    bits: int
    group: int | None
    symmetric: bool

    def words(self) -> str:
        """For messages."""
        size = "one scale per row" if self.group is None else f"groups of {self.group}"
        return f"{self.bits} bits, {size}, {'symmetric' if self.symmetric else 'asymmetric'}"


def scheme_of(codes: Codes) -> Scheme:
    """The scheme of one layer's codes."""
    return Scheme(codes.bits, codes.group, codes.symmetric)


def why_not(codes: Codes, dtype: torch.dtype) -> str | None:
    """Why the format cannot hold these codes for a model of this dtype; None if it can."""
    if codes.shift or bool((codes.zero != codes.zero.round()).any()):
        return "its zeros are no whole codes, and the format has no others"
    if not 1 <= codes.bits <= MOST_BITS:
        return f"the format has 1 to {MOST_BITS} bits, not {codes.bits}"
    if bool(((codes.zero < 0) | (codes.zero >= 1 << codes.bits)).any()):
        return "a zero lies outside the codes"
    if not torch.equal(codes.scale.to(dtype).float(), codes.scale):
        name = str(dtype).removeprefix("torch.")
        return f"its scales are no {name} numbers, which readers turn them into (solve with scales of {name})"
    return None


def widened(codes: Codes) -> Codes | None:
    """The same weights with the zero in the middle, in the fewest bits that hold them: usually one more. None if more than 8."""
    if codes.symmetric:
        return codes
    rows, groups = codes.scale.shape
    steps = codes.values.reshape(rows, groups, -1).int() - codes.zero.int().unsqueeze(-1)
    low, high = int(steps.min()), int(steps.max())
    bits = next(b for b in range(codes.bits, 16) if -(1 << (b - 1)) <= low and high < 1 << (b - 1))
    if bits > MOST_BITS:
        return None
    middle = 1 << (bits - 1)
    values = (steps + middle).to(torch.uint8).reshape(codes.values.shape)
    return replace(codes, values=values, zero=torch.full_like(codes.zero, middle), bits=bits, symmetric=True)


def tensors_of(codes: Codes) -> dict[str, Tensor]:
    """Name inside the layer -> tensor to store, on the CPU."""
    stored = {
        "weight_packed": pack(codes.values.cpu(), codes.bits),
        "weight_scale": codes.scale.cpu().to(codes.scale_dtype),
        "weight_shape": torch.tensor(codes.values.shape, dtype=torch.int64),
    }
    if not codes.symmetric:
        stored["weight_zero_point"] = pack(codes.zero.cpu().to(torch.uint8).T, codes.bits).T.contiguous()
    return stored


def codes_of(tensors: Mapping[str, Tensor], scheme: Scheme, where: str) -> Codes:
    """The codes of one layer from its stored tensors. `where` names folder and layer in messages. Raises ModelError."""
    if missing := [part for part in PARTS[:3] if part not in tensors]:
        raise ModelError(f"{where}: {missing[0]} is missing. Fetch the weights again.")
    rows, columns = (int(size) for size in tensors["weight_shape"])
    packed, scale, bits = tensors["weight_packed"], tensors["weight_scale"], scheme.bits
    if tuple(packed.shape) != (rows, words_of(columns, bits)):
        raise ModelError(
            f"{where}: {columns} codes of {bits} bits are {words_of(columns, bits)} words, the file has"
            f" {packed.shape[-1]}. compressed-tensors before 0.18 packed 3, 5, 6 and 7 bits otherwise: save it again with a newer one."
        )
    groups = 1 if scheme.group is None else columns // scheme.group
    if tuple(scale.shape) != (rows, groups):
        raise ModelError(f"{where}: scales are {list(scale.shape)}, config.json makes them {[rows, groups]}.")
    if scheme.symmetric:
        zero = torch.full((rows, groups), float(1 << (bits - 1)))
    else:
        if "weight_zero_point" not in tensors:
            raise ModelError(f"{where}: weight_zero_point is missing, and config.json calls the layer asymmetric.")
        zero = unpack(tensors["weight_zero_point"].T, bits, rows).T.float()
    values = unpack(packed, bits, columns)
    return Codes(values, scale.float(), zero, bits, scheme.group, scheme.symmetric, scale_dtype=scale.dtype)


def weight_of(codes: Codes, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`, as a reader of the format computes it: scales in that dtype first, then one rounding."""
    return replace(codes, scale=codes.scale.to(dtype).float()).weight().to(dtype)
