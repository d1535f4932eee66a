"""Codes for tests of what stores and reads them: the plainest rounding there is, and a model that holds just such weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwise.solvers.codes import Codes


def rounded(weight: Tensor, bits: int, group: int | None, *, symmetric: bool, dtype: torch.dtype) -> Codes:
    """Round to nearest on scales of this dtype; an asymmetric range always holds zero."""
    rows, columns = weight.shape
    x = weight.detach().float().reshape(rows, -1, group or columns)
    reach = x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)
    scale = x.abs().amax(-1) / (2 ** (bits - 1) - 1) if symmetric else reach / (2**bits - 1)
    scale = scale.clamp(min=1e-6).to(dtype).float()
    middle = torch.full_like(scale, 2 ** (bits - 1))
    zero = middle if symmetric else (-x.amin(-1).clamp(max=0) / scale).round().clamp(0, 2**bits - 1)
    values = ((x / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return Codes(values.to(torch.uint8).reshape(rows, columns), scale, zero, bits, group, symmetric, scale_dtype=dtype)


def quantized(model: nn.Module, scheme: Callable[[str, int], tuple[int, int | None, bool] | None]) -> dict[str, Codes]:
    """Round the linears of a model in place but for its head; `scheme` gives (bits, group, symmetric) by name and index, or None."""
    codes = {}
    linears = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    for index, (name, module) in enumerate(linears):
        if (found := scheme(name, index)) is None:
            continue
        dtype = module.weight.dtype if module.weight.dtype == torch.bfloat16 else torch.float16
        codes[name] = rounded(module.weight, found[0], found[1], symmetric=found[2], dtype=dtype)
        module.weight.data = codes[name].weight().to(module.weight.dtype)
    return codes
