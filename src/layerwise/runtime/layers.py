"""The layers of a model that could take another form, and the inputs that each gets in one pass."""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..randomness import generator_for
from ..structure.weights import kind_of, weights_in
from ..tasks.batches import Batch, call


@dataclass
class Seen:
    """One layer of the dense model and the largest input that it got in a pass; None: it got none."""

    name: str
    paths: tuple[str, ...]  # a shared module has several
    module: nn.Module
    parameter: Tensor
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    autocast: bool = False  # whether it was on then

    @property
    def rows(self) -> int | None:
        """Of that input: rows of a matrix, images of a convolution."""
        if self.shape is None:
            return None
        return math.prod(self.shape[:-3] if self.kind == "conv" else self.shape[:-1])

    @property
    def matrix(self) -> Tensor:
        """(outputs, inputs) of a linear, Conv1D turned."""
        weight = self.parameter.detach()
        return weight.t().contiguous() if self.kind == "conv1d" else weight

    def input(self) -> Tensor:
        """Random numbers of the shape and dtype that the layer got."""
        assert self.shape is not None  # noqa: S101  (the caller asked)
        return torch.randn(self.shape, generator=generator_for(0, self.name)).to(self.parameter.device, self.dtype)

    def why_not(self) -> str | None:
        """Why this layer cannot be replaced at all; None if it can."""
        kind = type(self.module)
        if kind not in (nn.Linear, nn.Conv2d) and kind.__name__ != "Conv1D":
            return f"modules of class {kind.__name__} are not replaced"
        if self.module._forward_hooks or self.module._forward_pre_hooks or self.module._backward_hooks:
            return "it has hooks, which would be lost"
        if "forward" in vars(self.module):  # as accelerate does
            return "its forward was set by hand, which would be lost"
        return None

    def mixed(self) -> str | None:
        """Why no form can do what it did in the pass, which was in another dtype than its weight's; None if it was in the same."""
        own = str(self.parameter.dtype).removeprefix("torch.")
        if self.autocast:
            return f"it runs under autocast, and forms compute in {own}: cast the model instead"
        if self.dtype != self.parameter.dtype:
            return f"its inputs are {str(self.dtype).removeprefix('torch.')}, its weight is {own}"
        return None


def seen_in_a_pass(model: nn.Module, given: Batch) -> list[Seen]:
    """All layers that multiply an input, in the order of modules."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    layers = [
        Seen(
            name=path if name == "weight" and path else f"{path}.{name}".lstrip("."),
            paths=tuple(paths[id(owner)]),
            module=owner,
            parameter=parameter,
            kind=str(kind_of(owner, name, parameter)),
        )
        for path, owner, name, parameter in weights_in(model)
    ]
    free = [layer for layer in layers if layer.why_not() is None]
    handles = [layer.module.register_forward_pre_hook(_Watch(layer), with_kwargs=True) for layer in free]
    try:
        call(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return layers


@dataclass
class _Watch:
    layer: Seen

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor):
            before = self.layer.shape
            if before is None or x.numel() > math.prod(before):
                self.layer.shape, self.layer.dtype = tuple(x.shape), x.dtype
                self.layer.autocast = torch.is_autocast_enabled(x.device.type)


def inputs_of(model: nn.Module, inputs: Batch | Tensor | None, batch: int, length: int) -> Batch:
    """One batch of keyword arguments; without `inputs` random tokens. Raises ModelError where it is not known what the model takes."""
    if isinstance(inputs, Tensor):
        return {next(iter(inspect.signature(model.forward).parameters), "input"): inputs}
    if inputs is not None:
        return inputs
    try:
        words: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        raise ModelError(
            f"fastest: what {type(model).__name__} takes is not known. Give one batch as it will get it: fastest(model, inputs)."
        ) from None
    return {"input_ids": torch.randint(words, (batch, length), generator=generator_for(0, "fastest"))}


def head_of(model: nn.Module) -> nn.Module | None:
    """The head that a transformers model names itself."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None
