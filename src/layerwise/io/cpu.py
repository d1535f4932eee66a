"""Run the linears of a model in whole numbers on a CPU, by an operator that PyTorch has itself: no compiler, no other library.

Weights are int8 with one scale per row, inputs are rounded to 7 bits by the range of each call, products are summed exactly and scaled back
(`torch.ops.quantized.linear_dynamic`, in PyTorch itself). For speed alone: how few bits a plan gave a layer does not matter here, and
nothing of it is saved.
"""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import ModelError, SelectionError


class Int8Linear(nn.Module):
    """A linear in int8. Takes and gives the dtype that the linear had; computes from float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        scale = (weight.abs().amax(1).double() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():  # that PyTorch means to replace these functions: int8_on_cpu says when it has
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        # reduce_range: without it, sums of pairs overflow on CPUs that have no VNNI
        result: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, reduce_range=True)
        return result.to(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def int8_on_cpu(model: nn.Module, *, exclude: Iterable[str] = ("lm_head",)) -> nn.Module:
    """Replace the linears of `model` by int8 ones, in place, and return it. For inference alone: there is nothing left to train or save.

    exclude: globs of names that stay (heads by default: their rounding costs most). Linears whose weight another module shares stay, too.
    Raises ModelError if the model is not on the CPU or PyTorch has no such kernel here, SelectionError if no linear is left to replace.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ModelError("int8_on_cpu: the model is not on the CPU. Move it there first: model.cpu().")
    if torch.backends.quantized.engine == "none" or not hasattr(torch, "quantize_per_channel"):
        raise ModelError("int8_on_cpu: this PyTorch has no such kernels for int8. Official builds up to 2.13 have.")
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
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, Int8Linear(module))
    return model
