"""What a changed weight does to the outputs of its layer, and how much the loss feels each output.

The first is the error that post-training quantisation minimises layer by layer, ||(W - W') X||^2. With the second each output counts by the
mean square of the loss's gradient there: the diagonal of the loss's Gauss-Newton matrix in the layer's outputs, by the gradients of
the labels as given (the "empirical Fisher"), tokens taken as independent. The sum over layers is then an estimate of twice the rise of
the loss, in one unit for all layers, where plain errors weigh layers by the size of their outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, ScoreError
from ..passes import check_whole
from ..passes.statistics import widest
from ..passes.wrapping import running
from ..structure import Layer, Structure, module_of
from ..tasks import left_alone
from ..tasks.batches import Batches
from ..tasks.losses import Loss, loss_of
from .watching import tell


def output_error(change: Tensor, gram: Tensor, importance: Tensor | None = None) -> float:
    """Sum over tokens and outputs of (change @ x)^2, each output times its importance.

    change: (rows, columns), W - W'. gram: (columns, columns), X^T X summed over tokens. importance: (rows,) >= 0, None: all 1.
    Products in float32, the sum in float64. Raises ScoreError if it is not finite.
    """
    change, gram = change.float(), gram.float()
    by_row = ((change @ gram) * change).sum(1).to(widest(change.device))
    total = float((by_row if importance is None else by_row * importance.to(by_row)).sum())
    if not torch.isfinite(torch.tensor(total)):
        raise ScoreError("the error of the outputs is not finite. Look for overflow in the weights or their inputs.")
    return max(0.0, total)  # of a change near 0 the rounding may win


def output_gradients(
    model: nn.Module, data: Batches, structure: Structure, *, loss: Loss = loss_of
) -> dict[str, Tensor]:
    """Layer name -> (matrices, rows) float64: squared gradients of the loss in the layer's outputs, summed over tokens and batches.

    One forward and backward pass a batch, without gradients of weights. A layer that no loss depends on has zeros. Raises ModelError for
    fused experts, whose outputs no module shows, and for a streamed model; ScoreError naming the layer for what is not finite.
    """
    check_whole(model, "a gradient")
    hidden = [layer.name for layer in structure if layer.kind not in ("linear", "conv1d", "conv")]
    if hidden:
        raise ModelError(
            f'layer "{hidden[0]}" has no outputs of its own to take gradients in. Weigh errors another way.'
        )
    sums = {layer.name: torch.zeros(layer.matrices, layer.rows, dtype=torch.float64) for layer in structure}
    with _watched_outputs(model, structure, sums):
        for index, batch in enumerate(data):
            tell(index, len(data), f"gradients of batch {index}")
            with running(index):
                value = loss(model, batch)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
    tell(len(data), len(data))
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ScoreError(
                f'layer "{name}": the gradient of its outputs is not finite. Use float32 or bfloat16 weights.'
            )
    return sums


@contextmanager
def _watched_outputs(model: nn.Module, structure: Structure, sums: dict[str, Tensor]) -> Iterator[None]:
    """Every output of these layers adds its squared gradient to `sums` on the way back. The model is as it was afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for layer in structure:
            handles.append(module_of(model, layer).register_forward_hook(partial(_watch, layer, sums[layer.name])))
        with left_alone([model]), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in required:
            parameter.requires_grad_(needed)


def _watch(layer: Layer, total: Tensor, module: nn.Module, inputs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        raise ModelError(f'layer "{layer.name}" does not return a tensor; exclude it.')
    # the first layer's output begins the graph; a copy, since what follows may write into a layer's output
    shown = (output if output.requires_grad else output.requires_grad_()).clone()
    shown.register_hook(partial(_add, layer, total))  # type: ignore[no-untyped-call]
    return shown


def _add(layer: Layer, total: Tensor, gradient: Tensor) -> None:
    outputs = gradient.detach().float().movedim(1, -1) if layer.kind == "conv" else gradient.detach().float()
    by_output = outputs.reshape(-1, layer.matrices * layer.rows).square().sum(0)
    total += by_output.reshape(layer.matrices, layer.rows).to(total)
