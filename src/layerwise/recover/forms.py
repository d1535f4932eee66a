"""What can be trained of a solved weight without undoing how it was compressed: values under a mask, scales of a grid, factors.

Each form holds leaves in float32 and makes the weight from them, in the shape and dtype that the model stores. What a format rounds
(a weight in bfloat16, a scale in 16 bits) is rounded in every forward pass and passed over in the backward pass, so that what is judged
is what is saved.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..engine import LayerSolved
from ..solvers.codes import Codes
from ..solvers.factors import Factors
from ..structure import Layer, from_matrices


class Form(Protocol):
    """A weight that can be trained as it is stored."""

    @property
    def leaves(self) -> list[Tensor]:
        """What an optimiser changes: values of the weight's own size."""
        ...

    @property
    def ratios(self) -> list[Tensor]:
        """What an optimiser changes, too: logarithms of scales, and shifts counted in steps of the grid."""
        ...

    def weight(self) -> Tensor:
        """The weight as it is stored; differentiable in all of it."""
        ...

    def event(self, event: LayerSolved, weight: Tensor) -> LayerSolved:
        """What is said of the layer now that this is its weight."""
        ...


def form_of(parameter: nn.Parameter, layer: Layer | None = None, event: LayerSolved | None = None) -> Form:
    """The form of a solved layer's weight, or of any other parameter (no layer). Zeros of other matrices stay, too: an earlier run may have
    made them. All else is free."""
    if layer is not None and event is not None and event.codes is not None:
        return Coded(parameter, layer, event.codes)
    if layer is not None and event is not None and event.factors is not None:
        return Factored(parameter, layer, event.factors)
    return Masked(parameter, held=layer is not None or parameter.ndim > 1)


class Masked:
    """A weight whose zeros stay zero; with held False they may move."""

    def __init__(self, parameter: nn.Parameter, *, held: bool) -> None:
        self.dtype = parameter.dtype
        keep = parameter.detach() != 0 if held else None
        self.keep = None if keep is None or keep.all() else keep
        self.values = _leaf(parameter.detach())
        self.leaves, self.ratios = [self.values], list[Tensor]()

    def weight(self) -> Tensor:
        kept = self.values if self.keep is None else self.values * self.keep
        return rounded(kept, self.dtype).to(self.dtype)

    def event(self, event: LayerSolved, weight: Tensor) -> LayerSolved:
        return replace(event, zeros=weight.numel() - int(torch.count_nonzero(weight)))


class Coded:
    """Codes that stay, with a factor to each scale; of a float grid also a shift, in steps."""

    def __init__(self, parameter: nn.Parameter, layer: Layer, codes: Codes) -> None:
        self.dtype, self.layer, self.codes = parameter.dtype, layer, codes.to(parameter.device)
        self.logs = _leaf(torch.zeros_like(self.codes.scale))
        self.steps = _leaf(torch.zeros_like(self.codes.scale)) if codes.shift else None
        self.leaves, self.ratios = list[Tensor](), [one for one in (self.logs, self.steps) if one is not None]

    def weight(self) -> Tensor:
        layer = self.layer
        matrices = self._codes().weight().reshape(layer.matrices, layer.rows, layer.columns)
        return rounded(from_matrices(matrices, layer), self.dtype).to(self.dtype)

    def event(self, event: LayerSolved, weight: Tensor) -> LayerSolved:
        with torch.no_grad():
            return replace(event, codes=self._codes().to("cpu"))

    def _codes(self) -> Codes:
        codes = self.codes
        scale = rounded(codes.scale * self.logs.exp(), codes.scale_dtype)
        scale = torch.where(scale > 0, scale, codes.scale)  # one that rounds to zero stays what it was
        if self.steps is None:
            return replace(codes, scale=scale)
        shift = rounded((codes.zero + self.steps) * codes.scale, codes.scale_dtype)
        return replace(codes, scale=scale, zero=shift / scale)


class Factored:
    """Factors and the kept entries of the core between them."""

    def __init__(self, parameter: nn.Parameter, layer: Layer, factors: Factors) -> None:
        self.dtype, self.layer, self.factors = parameter.dtype, layer, factors.to(parameter.device)
        self.parts = {part: _leaf(getattr(self.factors, part)) for part in ("left", "values", "right")}
        self.leaves, self.ratios = list(self.parts.values()), list[Tensor]()

    def weight(self) -> Tensor:
        stored = self.factors.values.dtype
        left, values, right = (rounded(self.parts[part], stored) for part in ("left", "values", "right"))
        wide = replace(self.factors, left=left, values=values, right=right)
        return rounded(from_matrices(wide.weight().unsqueeze(0), self.layer), self.dtype).to(self.dtype)

    def event(self, event: LayerSolved, weight: Tensor) -> LayerSolved:
        stored = self.factors.values.dtype
        left, values, right = (self.parts[part].detach().to(stored) for part in ("left", "values", "right"))
        return replace(event, factors=replace(self.factors, left=left, values=values, right=right).to("cpu"))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of this dtype, in the dtype of `values`, whose gradient is passed on as if nothing were rounded."""
    if values.dtype == dtype:
        return values
    # not values + (nearest - values): that sum is rounded once more
    return values.detach().to(dtype).to(values.dtype) + (values - values.detach())


def values_of(forms: Mapping[str, Form]) -> list[Tensor]:
    """Copies of all that is trained, in order; `put_back` takes them."""
    return [leaf.detach().clone() for form in forms.values() for leaf in (*form.leaves, *form.ratios)]


@torch.no_grad()
def put_back(forms: Mapping[str, Form], values: list[Tensor]) -> None:
    """What `values_of` gave."""
    leaves = [leaf for form in forms.values() for leaf in (*form.leaves, *form.ratios)]
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


def _leaf(values: Tensor) -> Tensor:
    """A copy of at least float32 that is trained."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True).requires_grad_()
