"""Masks held on a model while it is trained: what was pruned stays exactly zero, and no optimiser sees a gradient of it.

Two parts, and both are needed. A hook on the gradient, in every backward pass, so that clipping, moments and reductions over processes
see the sparse model. And the mask put on the weight again after every step of the optimiser, since moments from before, projections
of the gradient (GaLore, Muon) and the like move a weight whose gradient is zero. Under autocast the float32 parameters are what is
masked; an optimiser that keeps float32 copies of its own of half-precision weights writes into the parameter before it is masked.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, DataError, ShapeError
from .quantized import refuse_quantized

FILE = "masks.safetensors"  # in the folder of a checkpoint


class Masks:
    """Keep masks of some parameters of one model, in force from the moment it is made until `release`.

    keep: names of parameters, or of the modules whose `weight` they are, to bool tensors of the parameter's shape, True = kept.
    The masks are copied, a byte for each weight, and follow the parameters to their device.
    Raises ConfigError for a name the model does not have, or a weight that is given twice, also under the two names of a tied one;
    ShapeError for a mask that does not fit, ModelError for a model whose quantized weights take gradients.
    """

    def __init__(self, model: nn.Module, keep: Mapping[str, Tensor]) -> None:
        if not keep:
            raise ConfigError("there are no masks to hold: give at least one.")
        refuse_quantized(model)
        self._parameters: dict[str, nn.Parameter] = {}
        self._keep: dict[str, Tensor] = {}
        names: dict[int, str] = {}  # of each parameter, which has several where it is tied
        for given, mask in keep.items():
            name, parameter = _parameter(model, given)
            _check(name, mask, parameter)
            if (known := names.setdefault(id(parameter), given)) != given:
                raise ConfigError(f'two masks are given for one weight, as "{known}" and as "{given}": give one.')
            self._parameters[name] = parameter
            self._keep[name] = mask.clone(memory_format=torch.contiguous_format)
        self._handles: list[RemovableHandle] = []
        self._watched: list[Optimizer] = []
        for name, parameter in self._parameters.items():
            if parameter.is_floating_point():  # others never have gradients
                self._handles.append(_hooked(parameter, self._hook(name)))
        self.apply()

    def watch(self, optimizer: Optimizer) -> None:
        """Mask after every step of this optimiser, and clean its moments of what it remembers of pruned weights.

        Moments in the shape of the weight are masked now; later gradients keep them clean. Twice is as good as once.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        for name, parameter in self._parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(self._pruned(name), 0)
        if not any(known is optimizer for known in self._watched):
            self._watched.append(optimizer)
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.apply()))

    @torch.no_grad()
    def apply(self) -> None:
        """Zeros where pruned, in place; everything else stays bit-identical, zeros are never negative."""
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(self._pruned(name), 0)

    @torch.no_grad()
    def leaked(self) -> int:
        """Pruned weights that are not zero; NaN counts."""
        return sum(int(torch.count_nonzero(parameter[self._pruned(n)])) for n, parameter in self._parameters.items())

    def holds_in(self, model: nn.Module) -> bool:
        """Whether the masked parameters are still this model's own, not shards or copies of them."""
        own = {id(parameter) for parameter in model.parameters()}
        return all(id(parameter) in own for parameter in self._parameters.values())

    @property
    def kept(self) -> int:
        """Weights that the masks keep."""
        return sum(int(mask.sum()) for mask in self._keep.values())

    @property
    def density(self) -> float:
        """Kept over all weights under a mask, a fraction."""
        return self.kept / sum(mask.numel() for mask in self._keep.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name -> mask, bool, copies on the CPU: safetensors can hold it."""
        return {name: mask.to("cpu", copy=True) for name, mask in self._keep.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on these masks, of the same parameters, and apply them. Raises ConfigError, ShapeError; then nothing has changed."""
        if state.keys() != self._keep.keys():
            odd = sorted(state.keys() ^ self._keep.keys())
            raise ConfigError(
                f'these masks are not of the same {len(self._keep)} weights: "{odd[0]}" is in one set alone.'
            )
        for name, mask in state.items():
            _check(name, mask, self._parameters[name])
        self._keep = {name: state[name].clone(memory_format=torch.contiguous_format) for name in self._keep}
        self.apply()

    def save(self, folder: str | Path) -> None:
        """Write `masks.safetensors` into the folder."""
        save_file(self.state_dict(), Path(folder) / FILE)

    def release(self) -> None:
        """Let go: no hook is left on the model or any optimiser. The weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], []

    def callback(self) -> Any:
        """A `TrainerCallback` for the stock transformers Trainer: see `recover.trainer`."""
        from .trainer import MasksCallback

        return MasksCallback(self)

    def _pruned(self, name: str) -> Tensor:
        """True where pruned, on the parameter's device, where the mask stays from now on."""
        self._keep[name] = self._keep[name].to(self._parameters[name].device)
        return ~self._keep[name]

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        # not a product: a gradient that is not finite must not come through a pruned weight as NaN
        return lambda gradient: gradient.masked_fill(self._pruned(name), 0)


@contextmanager
def hold(model: nn.Module, keep: Mapping[str, Tensor], *optimizers: Optimizer) -> Iterator[Masks]:
    """`Masks` for the time of a `with`, the optimisers watched; more can be watched inside.

        with hold(model, keep, optimizer):
            for batch in data: ...

    Arguments and errors as in `Masks`.
    """
    masks = Masks(model, keep)
    try:
        for optimizer in optimizers:
            masks.watch(optimizer)
        yield masks
    finally:
        masks.release()


def masks_of(source: nn.Module | str | Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Parameter name -> mask: what `Masks.save` wrote into a folder, or what is not zero in a model that is pruned already.

    Take masks from a model once, before training: a kept weight may pass through zero later. names: of parameters or of modules with
    a `weight`; None: every parameter of two or more axes that has zeros. Raises DataError where there is nothing to find.
    """
    if isinstance(source, (str, Path)):
        file = Path(source) / FILE
        if not file.is_file():
            raise DataError(f"{source}: no {FILE} in this folder. Give a checkpoint that was written with masks held.")
        return load_file(file)
    if names is None:
        found = {n: p.detach() != 0 for n, p in source.named_parameters() if p.ndim > 1}
        masks = {name: mask for name, mask in found.items() if not mask.all()}
        if not masks:
            raise DataError(f"{type(source).__name__} has no zeros in any matrix: prune it first, or name the weights.")
        return masks
    return {name: parameter.detach() != 0 for name, parameter in (_parameter(source, name) for name in names)}


def _hooked(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """The hook on its gradient. A frozen parameter gets it too: it stays while the parameter is frozen, and may be trained later."""
    trained = parameter.requires_grad
    parameter.requires_grad_()
    try:
        handle: RemovableHandle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(trained)
    return handle


def _parameter(model: nn.Module, given: str) -> tuple[str, nn.Parameter]:
    """The full name and the parameter. Raises ConfigError, offering the nearest name."""
    known = dict(model.named_parameters(remove_duplicate=False))
    for name in (given, f"{given}.weight"):
        if name in known:
            return name, known[name]
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.0)
    raise ConfigError(
        f'mask of "{given}": the model has no such weight. The nearest name is "{near[0] if near else ""}".'
    )


def _check(name: str, mask: Tensor, parameter: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ShapeError(
            f'mask of "{name}" is {mask.dtype} {tuple(mask.shape)}; the weight takes torch.bool {tuple(parameter.shape)}.'
        )
