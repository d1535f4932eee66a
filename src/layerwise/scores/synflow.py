"""SynFlow: how much of the flow through a network of absolute weights a weight carries (Tanaka et al. 2020, arXiv:2006.05467).

The flow is the sum of the outputs for an input of ones; no label and no value of the data enters, only its shape. What goes into a
unit and what comes out is the same flow, so that no layer of a network of ReLUs is emptied before the others. Departures from the
official code: D1 the running means of batch norms count as zero, not by absolute value, so that all signals stay positive in a trained
network too. D2 token ids stay as they are: there are no ones to look up. D3 no activation is cut off at the top (ReLU6,
hard tanh): the flow of absolute weights is far above 6, and behind the cut nothing would carry any. D4 where the output is a softmax the
flow is summed before it: behind it the sum is always one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import DataError, ModelError, ScoreError
from ..passes import check_whole
from ..passes.wrapping import running
from ..structure import Structure, parameter_of, structure_of
from ..tasks import left_alone
from ..tasks.batches import Batch, call
from .stage import handed_over

_SOFTMAX = (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax)


def synaptic_flow(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w * dR/dw|, any shape, in the dtype given; high = keep."""
    return (weight * gradient).abs()


def synflow_scores(
    model: nn.Module, data: Sequence[Batch], structure: Structure, *, keep: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Layer name -> score of each of its weights, float64 on the CPU in the stored shape, >= 0. One forward and backward pass of
    one example.

    keep: layer name -> bool in the stored shape, False where a weight is pruned already and carries nothing. In float64, for its range
    and not for its digits: every layer without a norm multiplies the flow by about its width times its mean weight, and float32 ends at
    3e38. In float32 where there are fused experts, whose kernels take no more, and on MPS, which has no more. Beside the model it takes 8
    bytes for each weight, whose places the scores take one layer at a time, and a few times a layer.
    Raises DataError without a batch, WalkError if the model cannot run on it, ScoreError if it overflows.
    """
    if not len(data):
        raise DataError("synflow needs a batch for the shape of the inputs; there is none.")
    check_whole(model, "a gradient")
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    dtype = _dtype_for(model)
    tensors = {name: _absolute(parameter, dtype) for name, parameter in model.named_parameters()}
    leaves, scores = {}, dict[str, Tensor]()
    for layer in structure:
        leaves[layer.name] = tensors[first[id(parameter_of(model, layer))]]
        if keep is not None:
            leaves[layer.name].mul_(keep[layer.name].to(leaves[layer.name].device))
        leaves[layer.name].requires_grad_()
    tensors |= _positive_buffers(model, dtype)

    def take(name: str, weight: Tensor, gradient: Tensor) -> None:
        flow = synaptic_flow(weight.detach(), gradient)
        if not flow.isfinite().all():
            raise ScoreError(f'layer "{name}": its flow is not finite; the network is too deep without norms for it.')
        scores[name] = flow.cpu().double()
        weight.data = weight.new_empty(0)  # every operation that looked at it has had its turn

    with left_alone([model]), torch.enable_grad(), handed_over(leaves, take), _Uncut() as uncut:
        _flow(model, tensors, _of_ones(data[0], dtype), uncut).backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
    unseen = {name: leaf.shape for name, leaf in leaves.items() if name not in scores}
    scores |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in unseen.items()}
    return {name: scores[name] for name in leaves}


def _flow(model: nn.Module, tensors: Mapping[str, Tensor], ones: Batch, uncut: "_Uncut") -> Tensor:
    """The flow through the model with these tensors for its own, with its graph."""
    with running(0):
        flow: Tensor = functional_call(
            _Flow(model, uncut), {f"model.{n}": tensor for n, tensor in tensors.items()}, (ones,)
        )
    if not flow.requires_grad:
        raise ModelError(f"the outputs of {type(model).__name__} depend on none of the layers.")
    return flow


class _Uncut(TorchFunctionMode):
    """D3, wherever the model calls them. Nothing is written in place: what comes in is positive almost everywhere, and stays as it is.
    softmax: what the last one of the model gave, and of what (D4)."""

    softmax: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.relu6:
            return F.relu(args[0])
        if func in (F.hardtanh, F.hardtanh_):
            return args[0].clamp(min=given.get("min_val", args[1] if len(args) > 1 else -1.0))
        result = func(*args, **given)
        if func in _SOFTMAX:
            self.softmax = result, args[0] if args else given["input"]
        return result


class _Flow(nn.Module):
    """The sum of the logits, or of the first floating output, as a module that can be called on stand-ins."""

    def __init__(self, model: nn.Module, uncut: _Uncut) -> None:
        super().__init__()
        self.model, self.uncut = model, uncut

    def forward(self, batch: Batch) -> Tensor:
        output = call(self.model, batch)
        logits = getattr(output, "logits", None)
        leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(output)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                last, before = self.uncut.softmax or (None, leaf)
                return (before if leaf is last else leaf).sum()
        raise ModelError(f"{type(self.model).__name__} gives no output that could be summed.")


def _of_ones(batch: Batch, dtype: torch.dtype) -> Batch:
    """Ones for its floating inputs; the first example alone where all inputs have the batch in front, as one axis of one size."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if len({value.shape[:1] for value in inputs.values()}) == 1:
        inputs = {name: value[:1] for name, value in inputs.items()}
    return {n: torch.ones_like(v, dtype=dtype) if v.is_floating_point() else v for n, v in inputs.items()}


def _positive_buffers(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    buffers = {name: _cast(buffer.clone(), dtype) for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            name = f"{path}.running_mean" if path else "running_mean"
            buffers[name] = torch.zeros_like(buffers[name])  # D1
    return buffers


def _dtype_for(model: nn.Module) -> torch.dtype:
    experts = any(layer.kind == "experts" for layer in structure_of(model, include=["*"]))
    return torch.float32 if experts or next(model.parameters()).device.type == "mps" else torch.float64


def _absolute(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if not parameter.is_floating_point():
        return parameter.detach().abs()
    return parameter.detach().to(dtype, copy=True).abs_()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
