"""Linears whose weights stay codes: int4 in groups and int8 by row, multiplied by kernels that PyTorch has for them.

The weights are exactly those of the codes, inputs are not rounded: equal to the dense product within the dtype. Fewer bytes help where
reading weights is what takes the time, which is one or a few rows of input; with many the dense product is faster.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..solvers.codes import Codes
from .forms import Form

GROUPS = (256, 128, 64, 32)  # inputs with one scale, of the int4 kernels
MIDDLE = 8  # the code that the int4 kernels take for zero


def why_not_int4(codes: Codes, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the int4 kernels cannot hold these codes; None if they can. They compute in bfloat16 alone."""
    rows, columns = codes.values.shape
    if codes.bits > 4:
        return f"its codes have {codes.bits} bits"
    if dtype != torch.bfloat16:
        return f"the kernel computes in bfloat16, the model in {str(dtype).removeprefix('torch.')}"
    if rows % 16 or (device.type == "cuda" and columns % 128):
        return f"{rows} x {columns}: the kernel needs rows in multiples of 16" + ", inputs of 128" * (
            device.type == "cuda"
        )
    if _group(codes) is None:
        return f"groups of {codes.group or columns} inputs: the kernel has {', '.join(map(str, GROUPS))}"
    return None


def why_not_int8(codes: Codes, dtype: torch.dtype, device: torch.device) -> str | None:
    """The same for int8 by row, whose kernel is fast in bfloat16 alone."""
    if codes.group is not None and codes.group != codes.values.shape[1]:
        return f"its scales are for groups of {codes.group} inputs, and the kernel has one for a row"
    if dtype != torch.bfloat16:
        return f"the kernel computes in bfloat16, the model in {str(dtype).removeprefix('torch.')}"
    steps = codes.values.short() - codes.zero.short()
    if bool(((steps < -128) | (steps > 127)).any()) or bool((codes.zero != codes.zero.round()).any()):
        return "its codes are no whole numbers from -128 to 127"
    return None


class Int4Linear(Form):
    """Codes of up to 4 bits, a scale and a shift for every group. bfloat16."""

    name = "int4 weights"

    def __init__(self, codes: Codes, bias: Tensor | None, device: torch.device) -> None:
        super().__init__(torch.empty(codes.values.shape, dtype=torch.bfloat16, device=device), bias)
        group = _group(codes)
        assert group is not None  # noqa: S101  (the caller asked why_not_int4)
        self.group = group
        columns = codes.values.shape[1]
        spread = columns // group // codes.scale.shape[1]
        scale, zero = (part.float().repeat_interleave(spread, 1) for part in (codes.scale, codes.zero))
        # codes of fewer bits move to the middle, too: shifts are rounded, and should be small
        up = MIDDLE - (1 << (codes.bits - 1))
        self.scales = torch.stack([scale, (MIDDLE - up - zero) * scale], -1).transpose(0, 1).to(device, torch.bfloat16)
        self.scales = self.scales.contiguous()
        values = codes.values.to(device) + up
        if device.type == "cpu":
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        else:
            pairs = values[:, ::2] << 4 | values[:, 1::2]
            self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)

    def product(self, x: Tensor) -> Tensor:
        cpu = x.device.type == "cpu"
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if cpu else torch.ops.aten._weight_int4pack_mm
        result: Tensor = kernel(x.contiguous(), self.packed, self.group, self.scales)
        return result

    def parts(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scales": self.scales}


class Int8WeightLinear(Form):
    """Codes of up to 8 bits, one scale for a row. bfloat16."""

    name = "int8 weights"

    def __init__(self, codes: Codes, bias: Tensor | None, device: torch.device) -> None:
        super().__init__(torch.empty(codes.values.shape, dtype=torch.bfloat16, device=device), bias)
        codes = replace(codes, scale=codes.scale.to(torch.bfloat16))
        self.codes = (codes.values.short() - codes.zero.short()).to(device, torch.int8).contiguous()
        self.scale = codes.scale[:, 0].to(device).contiguous()

    def product(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scale)
        return result

    def dense(self) -> Tensor:
        return self.codes.to(self.dtype) * self.scale[:, None]

    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}


def _group(codes: Codes) -> int | None:
    """The largest group that the kernels have and that lies within one of the codes'."""
    own = codes.group or codes.values.shape[1]
    return next((group for group in GROUPS if own % group == 0), None)
