"""Which forms a layer could take on a device, and for the others why not. Nothing is timed here."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..solvers.codes import Codes
from .conv import NarrowConv2d, channels_of
from .forms import BsrLinear, CsrLinear, Form, NarrowLinear, TwoFourLinear
from .gather import GatherLinear
from .int8 import Int8Linear, int8_missing
from .weight_only import Int4Linear, Int8WeightLinear, why_not_int4, why_not_int8
from .zeros import Zeros, zeros_of

MOST_CSR = 0.7  # density from which on no machine has a sparse product that is faster: not tried
MOST_STORED = 0.8  # the same of what groups and blocks store
MULTIPLES = {  # rows and columns of a 2:4 matrix must be multiples of these (cuSPARSELt)
    torch.float16: (16, 16),
    torch.bfloat16: (16, 16),
    torch.int8: (32, 32),
}
FORMS = ("narrow", "gather", "bsr", "csr", "2:4", "int4 weights", "int8 weights", "int8")


@dataclass
class Candidates:
    """builds: form -> what makes it. refused: form -> why this layer cannot have it, for every other form."""

    looks: str  # the zeros, in words
    density: float
    builds: dict[str, Callable[[], Form]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def consider(self, form: str, refusal: str | None, build: Callable[[], Form]) -> None:
        """Add it to the ones to be timed, or to the refused."""
        if refusal is None:
            self.builds[form] = build
        else:
            self.refused[form] = refusal


def for_matrix(
    weight: Tensor, bias: Tensor | None, *, codes: Codes | None = None, rounding: bool = False
) -> Candidates:
    """Of a linear: weight (rows, columns), where it lies. codes: what the weight is made of, where it was quantised.

    rounding: also int8 with rounded inputs, whose outputs are near the dense ones, not equal.
    """
    zeros = zeros_of(weight)
    found = Candidates(zeros.words(), zeros.density)
    found.consider("narrow", _why_not_narrow(zeros), lambda: NarrowLinear(weight, bias))
    found.consider("gather", _why_not_gather(zeros), lambda: GatherLinear(weight, bias, zeros.height))
    found.consider("bsr", _why_not_bsr(zeros), lambda: BsrLinear(weight, bias, zeros.block))
    found.consider("csr", _why_not_csr(zeros), lambda: CsrLinear(weight, bias))
    found.consider("2:4", why_not_two_four(weight, zeros), lambda: TwoFourLinear(weight, bias))
    where = weight.dtype, weight.device
    unknown = "its weights are not codes" if codes is None else None
    found.consider(
        "int4 weights",
        unknown or why_not_int4(codes, *where),  # type: ignore[arg-type]
        lambda: Int4Linear(codes, bias, weight.device),  # type: ignore[arg-type]
    )
    found.consider(
        "int8 weights",
        unknown or why_not_int8(codes, *where),  # type: ignore[arg-type]
        lambda: Int8WeightLinear(codes, bias, weight.device),  # type: ignore[arg-type]
    )
    found.consider("int8", _why_not_int8_inputs(weight, rounding), lambda: Int8Linear(weight, bias))
    return found


def for_convolution(conv: nn.Conv2d) -> Candidates:
    """Of a convolution: without the channels that are zero, or as it is."""
    outputs, inputs = channels_of(conv.weight)
    gone = conv.out_channels - len(outputs), conv.weight.shape[1] - len(inputs)
    density = int(torch.count_nonzero(conv.weight)) / max(1, conv.weight.numel())
    words = [f"{count} {name} channels zero" for count, name in zip(gone, ("output", "input"), strict=True) if count]
    found = Candidates(", ".join([f"{density:.1%} kept", *words]), density)
    refusal = "no channel is all zero" if not any(gone) else None
    if conv.groups > 1 and refusal is None:
        refusal = f"it has {conv.groups} groups"
    found.consider("narrow", refusal, lambda: NarrowConv2d(conv))
    found.refused |= dict.fromkeys(FORMS[1:], "it is a convolution: only whole channels can be left out")
    return found


def why_not_two_four(weight: Tensor, zeros: Zeros | None = None) -> str | None:
    """Why PyTorch has no 2:4 kernel for this matrix where it lies; None if it has one."""
    zeros = zeros_of(weight) if zeros is None else zeros
    rows, columns = zeros.rows, zeros.columns
    if not zeros.two_four:
        return "not 2:4" if columns % 4 == 0 else f"{columns} inputs do not divide by 4"
    if weight.device.type != "cuda":
        return f"2:4 has kernels on CUDA only, and none on {weight.device.type}"
    if weight.dtype not in MULTIPLES:
        return f"2:4 has no kernel for {str(weight.dtype).removeprefix('torch.')}"
    if rows % MULTIPLES[weight.dtype][0] or columns % MULTIPLES[weight.dtype][1]:
        return f"{rows} x {columns} are no multiples of {' x '.join(map(str, MULTIPLES[weight.dtype]))}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 needs an Ampere GPU or a later one"
    return None


def _why_not_narrow(zeros: Zeros) -> str | None:
    return None if zeros.narrower else "no row or column is all zero"


def _why_not_gather(zeros: Zeros) -> str | None:
    if zeros.gathered > MOST_STORED:
        return f"groups of {zeros.height} rows need {zeros.gathered:.0%} of their columns"
    return None


def _why_not_bsr(zeros: Zeros) -> str | None:
    if zeros.block is None:
        return f"{zeros.rows} x {zeros.columns} does not divide into square blocks of 8 or more"
    if zeros.stored > MOST_STORED:
        return f"blocks of {zeros.block} x {zeros.block}: {zeros.stored:.0%} of them hold a weight"
    return None


def _why_not_csr(zeros: Zeros) -> str | None:
    return f"{zeros.density:.0%} of the weights are kept" if zeros.density > MOST_CSR else None


def _why_not_int8_inputs(weight: Tensor, rounding: bool) -> str | None:
    if not rounding:
        return "it rounds its inputs, and that was not asked for"
    if weight.device.type != "cpu":
        return f"it runs on CPUs, and not on {weight.device.type}"
    return int8_missing()
