"""A model on stand-ins for its parameters, whose gradients are handed over one at a time.

The model runs on stand-ins for its parameters and on copies of its buffers (`torch.func.functional_call`), so that nothing is
accumulated in `.grad`, no hook on a parameter fires and no running statistic moves. A stand-in shares the parameter's memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import DataError, LayerwiseError, ModelError, ScoreError
from ..passes import check_whole
from ..passes.wrapping import cannot_run, running
from ..structure import Structure, parameter_of
from ..tasks import left_alone
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of

Take = Callable[[str, Tensor, Tensor], None]
"""Called with a layer's name, its weight, and the gradient of one backward pass, which is freed unless this keeps it."""


@contextmanager
def handed_over(leaves: Mapping[str, Tensor], take: Take) -> Iterator[None]:
    """Within, a backward pass gives each gradient to `take` as soon as it is whole, so that no two exist together."""

    def hand(name: str, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            take(name, leaf, gradient)

    handles = []
    try:
        for name, leaf in leaves.items():
            handles.append(leaf.register_post_accumulate_grad_hook(partial(hand, name)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stage:
    """`leaves`: layer name -> its stand-in, in their order; these alone have gradients. Open it as a context.

    weights: parameter name -> values to use instead of the model's. temperature: divides the logits before the loss. by_batch: batch
    norms normalise by the batch, as they do before any training, when their running statistics mean nothing; all else is in
    evaluation mode. wide: compute in float32 where tensors are float16, whose gradients underflow and overflow; takes 4 bytes for each of
    their numbers. Raises DataError without batches, ModelError for a model that is not in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Batch],
        structure: Structure,
        *,
        weights: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
        loss: Loss = loss_of,
        by_batch: bool = True,
        wide: bool = False,
    ) -> None:
        if not len(data):
            raise DataError("a gradient needs batches with what the loss is taken of; there are none.")
        check_whole(model, "a gradient")
        self.model, self.temperature, self.wide = model, temperature, wide
        self._logits: Tensor | None = None  # of a pass, divided by the temperature
        self._used = temperature == 1  # whether the loss is taken from them
        self._tensors = {
            n: self._widened((weights or {}).get(n, parameter).detach()) for n, parameter in model.named_parameters()
        }
        first = {id(parameter): name for name, parameter in model.named_parameters()}  # of the names of a tied tensor
        self.leaves = {
            layer.name: self._tensors[first[id(parameter_of(model, layer))]].requires_grad_() for layer in structure
        }
        self._tensors |= {name: self._widened(buffer.clone()) for name, buffer in model.named_buffers()}
        self._whole = _Loss(model, loss)
        self._context = left_alone([model], by_batch=by_batch)

    def __enter__(self) -> "Stage":
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
        batch = {name: self._widened(value) for name, value in batch.items()}
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
                f"batch {index}: the loss is {float(value.detach())}. Check the weights and the data for NaN and overflow."
            )
        if not value.requires_grad:
            raise ModelError(
                f"batch {index}: the loss of {type(self.model).__name__} depends on none of the {len(self.leaves)} layers, or is detached."
            )
        return value

    def gradients(self, batch: Batch, index: int, take: Take, scale: float = 1.0) -> None:
        """Those of one batch's loss, times `scale`, to `take`. Raises what `loss` does."""
        value = self.loss(batch, index)
        with running(index), handed_over(self.leaves, take):
            value.backward(torch.full_like(value, scale), inputs=list(self.leaves.values()))  # type: ignore[no-untyped-call]

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self.wide and tensor.dtype == torch.float16 else tensor

    def zeros(self) -> dict[str, Tensor]:
        """Layer name -> float32 zeros in the stored shape."""
        return {n: torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False) for n, leaf in self.leaves.items()}

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
