"""Whether a form, or a model of forms, gives what the dense one gives."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import ModelError

# relative error (Frobenius) of a layer's output up to which a form is equal to the dense one: another order of summation, no more
EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# the same of the whole model's, through all its layers
WHOLE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
ROUNDING = ("int8",)  # forms that are near, not equal
NEAR = 0.1  # their limit, of one layer
ANYTHING = 1.0  # and of a model: what is further off than this has lost it


def layer_limit(form: str, dtype: torch.dtype) -> float:
    """The largest relative error with which a layer may take this form."""
    return NEAR if form in ROUNDING else EQUAL.get(dtype, EQUAL[torch.float32])


def whole_limit(rounding: bool, dtype: torch.dtype) -> float:
    """The same for a model, whether or not some of its forms round."""
    return ANYTHING if rounding else WHOLE.get(dtype, WHOLE[torch.float32])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`; infinite where shapes differ or the difference is not a number."""
    if got.shape != exact.shape:
        return float("inf")
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    got, exact = got.to(wide), exact.to(wide)
    error = float((got - exact).norm() / exact.norm().clamp(min=torch.finfo(wide).tiny))
    return error if error == error else float("inf")


def first_tensor(output: object) -> Tensor:
    """What a model returns, to be compared: its logits, or the first tensor of numbers. Raises ModelError if there is none."""
    for one in (getattr(output, "logits", None), *_within(output)):
        if isinstance(one, Tensor) and one.is_floating_point():
            return one
    raise ModelError("fastest: the model returns no tensor of numbers, so its outputs cannot be compared.")


def _within(output: object) -> Iterator[object]:
    if isinstance(output, Mapping):
        yield from output.values()
    elif isinstance(output, list | tuple):
        yield from output
    else:
        yield output
