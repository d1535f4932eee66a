"""Gradients of a loss with respect to the weights of chosen layers; the model is left as it was, to the last bit and flag.

The model runs on stand-ins for its parameters and on copies of its buffers (`torch.func.functional_call`), so that nothing is
accumulated in `.grad`, no hook on a parameter fires and no running statistic moves. Batch norms normalise by the batch, as they do
before any training, when their running statistics mean nothing; all else is in evaluation mode, without dropout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import DataError, LayerwiseError, ModelError, ScoreError
from ..passes import check_whole
from ..passes.wrapping import cannot_run
from ..structure import Structure, parameter_of
from ..tasks import left_alone
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from .watching import part, tell


def gradients(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    weights: Mapping[str, Tensor] | None = None,
    temperature: float = 1.0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> gradient of the loss, float32 in the stored shape, summed over the batches; zeros where the loss does not look.

    weights: parameter name -> values to use instead of the model's. temperature: divides the logits before the loss.
    Raises DataError without batches, ModelError for a model that is not in memory, WalkError naming the batch it cannot run on, and what
    the loss raises; ScoreError naming the layer where a gradient is not finite.
    """
    with _Stage(model, data, structure, weights or {}, temperature, loss) as stage:
        total = stage.zeros()
        for index, batch in enumerate(data):
            tell(index, len(data), f"gradient of batch {index}")
            found = torch.autograd.grad(stage.loss(batch, index), stage.leaves, allow_unused=True)
            stage.add(total, found)
    tell(len(data), len(data))
    return _finite(total)


def hessian_products(
    model: nn.Module,
    data: Sequence[Batch],
    structure: Structure,
    *,
    temperature: float = 1.0,
    loss: Loss = loss_of,
) -> dict[str, Tensor]:
    """Layer name -> H g, float32 in the stored shape: g and H are gradient and Hessian of the loss summed over the batches.

    A second backward pass through the first, batch by batch. Errors as in `gradients`, and ScoreError for a model with an operation
    that cannot be differentiated twice.
    """
    with part(0, 2):
        g = gradients(model, data, structure, temperature=temperature, loss=loss)
    # the fused attention kernels have no second derivative
    with part(1, 2), _Stage(model, data, structure, {}, temperature, loss) as stage, sdpa_kernel(SDPBackend.MATH):
        total, direction = stage.zeros(), list(g.values())
        for index, batch in enumerate(data):
            tell(index, len(data), f"curvature of batch {index}")
            value = stage.loss(batch, index)
            try:
                first = torch.autograd.grad(value, stage.leaves, allow_unused=True, create_graph=True)
                pairs = [(d, one) for d, one in zip(direction, first, strict=True) if one is not None]
                along = sum((d * one.float()).sum() for d, one in pairs)
                if not isinstance(along, Tensor) or not along.requires_grad:
                    continue  # a loss that is linear in the weights has no curvature
                stage.add(total, torch.autograd.grad(along, stage.leaves, allow_unused=True))
            except RuntimeError as error:
                if not any(word in str(error) for word in ("derivative", "differentiate", "double backward")):
                    raise
                raise ScoreError(
                    f"{type(model).__name__} has an operation that cannot be differentiated twice: {str(error).splitlines()[0]}"
                ) from error
        tell(len(data), len(data))
    return _finite(total)


def layer_means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer name -> mean score of its weights: one number for tables and plans."""
    return {name: float(score.cpu().mean(dtype=torch.float64)) for name, score in scores.items()}


class _Stage:
    """A model on stand-ins: `leaves` are those of the chosen layers, in their order, and have gradients; nothing else has."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Batch],
        structure: Structure,
        weights: Mapping[str, Tensor],
        temperature: float,
        loss: Loss,
    ) -> None:
        if not len(data):
            raise DataError("a gradient needs batches with what the loss is taken of; there are none.")
        check_whole(model, "a gradient")
        self.model, self.temperature = model, temperature
        self._logits: Tensor | None = None  # of a pass, divided by the temperature
        self._used = temperature == 1  # whether the loss is taken from them
        self._names = [layer.name for layer in structure]
        self._tensors = {n: weights.get(n, parameter).detach() for n, parameter in model.named_parameters()}
        first = {id(parameter): name for name, parameter in model.named_parameters()}  # of the names of a tied tensor
        self.leaves = [self._tensors[first[id(parameter_of(model, layer))]].requires_grad_() for layer in structure]
        self._tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._whole = _Loss(model, loss)
        self._context = left_alone([model], by_batch=True)

    def __enter__(self) -> "_Stage":
        self._context.__enter__()
        self._handle = self.model.register_forward_hook(self._cool) if self.temperature != 1 else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._context.__exit__(*error)

    def loss(self, batch: Batch, index: int) -> Tensor:
        """Of one batch, with its graph. Raises ScoreError if it is not finite, ModelError if it depends on no chosen layer, DataError
        for a single example where batch norms see one value of each channel, WalkError if the model cannot run on it."""
        renamed = {f"model.{name}": tensor for name, tensor in self._tensors.items()}
        try:
            with torch.enable_grad():
                value: Tensor = functional_call(self._whole, renamed, (batch,))
        except LayerwiseError:
            raise
        except Exception as error:  # the model's own code: any class may come out
            if "more than 1 value per channel" not in str(error):
                raise cannot_run(error, index, None) from error
            raise DataError(
                "batch norms normalise by the batch here: give batches of more than one example."
            ) from error
        logits, self._logits = self._logits, None
        if not self._used and value.requires_grad:
            self._check_temperature(value, logits)
        if not torch.isfinite(value):
            raise ScoreError(
                f"the loss is {float(value.detach())}. Check the weights and the data for NaN and overflow."
            )
        if not value.requires_grad:
            raise ModelError(
                f"the loss of {type(self.model).__name__} depends on none of the {len(self.leaves)} layers."
            )
        return value

    def zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False)
            for name, leaf in zip(self._names, self.leaves, strict=True)
        }

    def add(self, total: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> None:
        for name, one in zip(self._names, found, strict=True):
            if one is not None:
                total[name].add_(one.detach())

    def _check_temperature(self, value: Tensor, logits: Tensor | None) -> None:
        """Raise ModelError if the loss is not taken from the divided logits: some models compute their own, before the division."""
        if logits is not None and logits.requires_grad:
            (slope,) = torch.autograd.grad(value, [logits], retain_graph=True, allow_unused=True)
            self._used = slope is not None
        if not self._used:
            raise ModelError(
                f"the loss of {type(self.model).__name__} is not taken from logits that a temperature of {self.temperature:g} could"
                " divide. Use 1."
            )

    def _cool(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The output with its logits divided by the temperature; an output that is one tensor is the logits."""
        if isinstance(output, Tensor):
            self._logits = output = output / self.temperature
        elif isinstance(logits := getattr(output, "logits", None), Tensor):
            self._logits = output.logits = logits / self.temperature
        return output


class _Loss(nn.Module):
    """The loss as a module, so that it can be called on stand-ins."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


def _finite(total: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, gradient in total.items():
        if not torch.isfinite(gradient.sum()) and not gradient.isfinite().all():
            raise ScoreError(
                f'layer "{name}": its gradient is not finite. float32 or bfloat16 overflow less than float16.'
            )
    return total
