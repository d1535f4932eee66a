"""Linears in whole numbers on a CPU, by an operator that PyTorch has itself: no compiler, no other library.

Weights are int8 with one scale per row, inputs 8 bits with one scale per token (one for all tokens of a call ruins language models, whose
first token is far larger than the rest), products are summed exactly and scaled back (`torch.ops.quantized.linear_dynamic`). For speed
alone: how few bits a plan gave a layer does not matter here.
"""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import ModelError, SelectionError
from .forms import Form


class Int8Linear(Form):
    """A linear in int8, its inputs rounded at each call: near the dense one, not equal to it. Computes from float32."""

    name = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.float())
        weight = weight.detach().float()
        scale = (weight.abs().amax(1).double() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        with (
            warnings.catch_warnings()
        ):  # that PyTorch means to replace these functions: `int8_missing` says when it has
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.reduce_range = overflows()

    def applied(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's own modules call it)
        result = self.product(input)
        return (result if self.bias is None else result.add_(self.bias)).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        # every token in [-1, 1]: the operator's one range for all is then the range of each
        result: Tensor = torch.ops.quantized.linear_dynamic(x / largest, self.packed, self.reduce_range)
        return result.mul_(largest)

    def parts(self) -> dict[str, Tensor]:
        rounded = torch.ops.quantized.linear_unpack(self.packed)[0]
        return {"codes": rounded.int_repr(), "scale": rounded.q_per_channel_scales().float()}

    def dense(self) -> Tensor:
        dense: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()
        return dense.to(self.dtype)


@cache
def overflows() -> bool:
    """Whether sums of pairs of products overflow here, as without VNNI: inputs then get 7 bits instead of 8. Tried out, not looked up."""
    ones = torch.ones(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        weight = torch.quantize_per_channel(127 * ones, torch.ones(64).double(), torch.zeros(64).long(), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    found: Tensor = torch.ops.quantized.linear_dynamic(ones, packed, False)
    return bool((found - 64 * 127).abs().max() > 64)


def int8_missing() -> str | None:
    """Why this PyTorch cannot run `Int8Linear`; None if it can."""
    if torch.backends.quantized.engine == "none" or not hasattr(torch, "quantize_per_channel"):
        return "this PyTorch has no such kernels for int8. Official builds up to 2.13 have."
    return None


def int8_on_cpu(model: nn.Module, *, exclude: Iterable[str] = ("lm_head",)) -> nn.Module:
    """Replace the linears of `model` by int8 ones, in place, and return it. For inference alone: there is nothing left to train.

    `fastest(model, rounding=True)` measures and takes int8 only where it is faster; this asks nothing.
    exclude: globs of names that stay (heads by default: their rounding costs most). Linears whose weight another module shares stay, too.
    Raises ModelError if the model is not on the CPU or PyTorch has no such kernel here, SelectionError if no linear is left to replace.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ModelError("int8_on_cpu: the model is not on the CPU. Move it there first: model.cpu().")
    if missing := int8_missing():
        raise ModelError(f"int8_on_cpu: {missing}")
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    globs = tuple(exclude)
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and owners[id(module.weight)] == 1
        and not any(fnmatchcase(name, glob) for glob in globs)
    ]
    if not chosen:
        raise SelectionError(f"int8_on_cpu: no linear to replace (exclude: {', '.join(globs) or 'nothing'}).")
    for name, module in chosen:
        model.set_submodule(name, Int8Linear(module.weight, module.bias))
    return model
