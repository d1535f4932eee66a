"""A linear in other forms, each a module that takes the place of the linear: zeros left out, in the way a kernel wants it.

For inference alone: nothing here has a gradient, and a form stays on the device and in the dtype that it was made for. All give the product
with the dense matrix up to the order of summation; where an input is infinite or NaN, a zero weight that is left out gives nothing, while a
dense product gives NaN.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError, ShapeError
from .outputs import layer_limit, relative_error
from .zeros import keeps_two_of_four, zeros_of

MAT_VEC = 1  # rows of input up to which a sparse matrix meets a vector: kernels for that are several times as fast
TILE = 32  # rows of input that go through a CSR product at once: more fall out of the cache


class Form(nn.Module, ABC):
    """A linear's stand-in: (..., in_features) -> (..., out_features), in the dtype that the linear had."""

    name: ClassVar[str]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = None if bias is None else bias.detach()
        self.turned = False  # whether the layer it stands for stores (inputs, outputs)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's own modules call it)
        """Under autocast the kernels compute in their own dtype all the same, and the result has that of autocast, as a linear's has."""
        device = self.device.type
        if not torch.is_autocast_enabled(device):
            return self.applied(input.to(self.dtype))
        with torch.autocast(device, enabled=False):
            result = self.applied(input.to(self.dtype))
        return result if self.dtype == torch.float64 else result.to(torch.get_autocast_dtype(device))

    def applied(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's own modules call it)
        """What `forward` gives of an input in the form's dtype, autocast being off."""
        flat = input.reshape(-1, self.in_features)
        # an expert may get no tokens at all
        result = self.product(flat) if len(flat) else input.new_zeros(0, self.out_features)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*input.shape[:-1], self.out_features)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """(rows, in_features) -> (rows, out_features), contiguous, without the bias."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """What it stores instead of the weight, as plain tensors."""

    @property
    def bytes(self) -> int:
        """Of what it stores instead of the weight."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def dense(self) -> Tensor:
        """(out_features, in_features): the matrix it stands for."""
        return self.product(torch.eye(self.in_features, dtype=self.dtype, device=self.device)).t()

    @property
    def weight(self) -> Tensor:
        """As the layer stored it, made anew at each call: for models that look at it."""
        return self.dense().t() if self.turned else self.dense()

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight that is set, as transformers does to tie a head, must be the one that there is. Raises ModelError for another."""
        if name != "weight":
            super().__setattr__(name, value)
        elif not (
            isinstance(value, Tensor)
            and relative_error(value.detach(), self.weight) <= layer_limit(self.name, self.dtype)
        ):
            raise ModelError(
                f"{type(self).__name__} was made for another weight. Set that of the dense model, then call fastest again."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Form":
        """What it stores never changes, so a copy shares it; sparse tensors could not be copied so anyway."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__ = {name: copy.copy(one) if isinstance(one, dict) else one for name, one in vars(self).items()}
        return twin

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As the layer it stands for: what is saved is the dense model."""
        destination[f"{prefix}weight"] = self.weight.contiguous()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.to(self.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.bytes:,} bytes"
            f" instead of {self.in_features * self.out_features * self.dtype.itemsize:,}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Form":
        """Called by `.to`, `.half` and the like. Raises ModelError where it would have to become something else."""
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if after.dtype != before.dtype or after.device != before.device:
            raise ModelError(
                f"{type(self).__name__} was made for {before.dtype} on {before.device}. Move the dense model, then call fastest again."
            )
        return self


class NarrowLinear(Form):
    """Rows and columns that are all zero are not there; nothing at all of a layer of zeros."""

    name = "narrow"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        zeros = zeros_of(weight)
        self.rows = zeros.kept_rows if len(zeros.kept_rows) < zeros.rows else None
        self.columns = zeros.kept_columns if len(zeros.kept_columns) < zeros.columns else None
        kept = weight.detach()[zeros.kept_rows][:, zeros.kept_columns]
        self.kept = kept.contiguous()

    def product(self, x: Tensor) -> Tensor:
        if not self.kept.numel():
            return x.new_zeros(len(x), self.out_features)
        result = F.linear(x if self.columns is None else x.index_select(1, self.columns), self.kept)
        return result if self.rows is None else x.new_zeros(len(x), self.out_features).index_copy_(1, self.rows, result)

    def dense(self) -> Tensor:
        whole = self.kept.new_zeros(self.out_features, self.in_features)
        rows, columns = (
            torch.arange(size, device=self.device) if some is None else some
            for size, some in zip(whole.shape, (self.rows, self.columns), strict=True)
        )
        whole[rows[:, None], columns] = self.kept
        return whole

    def parts(self) -> dict[str, Tensor]:
        indices = {"rows": self.rows, "columns": self.columns}
        return {"kept": self.kept} | {name: part for name, part in indices.items() if part is not None}


class CsrLinear(Form):
    """Compressed sparse rows: 4 bytes of index for every weight that is kept.

    On CPUs MKL computes in float32 and float64 only, so other dtypes are cast there and back.
    """

    name = "csr"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        wide = weight.device.type != "cpu" or weight.dtype in (torch.float32, torch.float64)
        self.computes_in = weight.dtype if wide else torch.float32
        self.matrix = _compressed(weight.detach().to(self.computes_in).to_sparse_csr(), torch.sparse_csr_tensor)

    def product(self, x: Tensor) -> Tensor:
        x = x.to(self.computes_in)
        if len(x) <= MAT_VEC:
            result = (self.matrix @ x[0])[None]
        elif x.device.type == "cpu":
            result = x.new_empty(len(x), self.out_features)
            for rows, some in zip(torch.split(result, TILE), torch.split(x, TILE), strict=True):
                rows.copy_((self.matrix @ some.t().contiguous()).t())
        else:
            result = (self.matrix @ x.t().contiguous()).t().contiguous()
        return result.to(self.dtype)

    def dense(self) -> Tensor:
        return self.matrix.to_dense().to(self.dtype)

    def parts(self) -> dict[str, Tensor]:
        return _parts(self.matrix)


class BsrLinear(Form):
    """Block sparse rows: square blocks that hold a weight are stored whole."""

    name = "bsr"

    def __init__(self, weight: Tensor, bias: Tensor | None, block: int | None = None) -> None:
        super().__init__(weight, bias)
        side = zeros_of(weight).block if block is None else block
        if side is None or self.out_features % side or self.in_features % side:
            raise ShapeError(f"bsr: {self.out_features} x {self.in_features} does not divide into blocks of {side}.")
        self.block = side
        self.matrix = _compressed(weight.detach().to_sparse_bsr((side, side)), torch.sparse_bsr_tensor)

    def product(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.t().contiguous()).t().contiguous()

    def dense(self) -> Tensor:
        return self.matrix.to_dense()

    def parts(self) -> dict[str, Tensor]:
        return _parts(self.matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks of {self.block} x {self.block}"


class TwoFourLinear(Form):
    """2 of every 4 inputs, for the sparse tensor cores of NVIDIA hardware since Ampere. CUDA only."""

    name = "2:4"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        if not keeps_two_of_four(weight):
            raise ShapeError("2:4: a group of 4 inputs has more than 2 weights, or the inputs do not divide by 4.")
        # + 0.0: kernels mishandled negative zeros
        self.matrix = torch.sparse.to_sparse_semi_structured((weight.detach() + 0.0).contiguous())

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def dense(self) -> Tensor:
        whole: Tensor = self.matrix.to_dense()  # type: ignore[no-untyped-call]
        return whole

    def parts(self) -> dict[str, Tensor]:
        inner = ((name, getattr(self.matrix, name, None)) for name in ("packed", "meta"))
        return {name: part for name, part in inner if isinstance(part, Tensor)}


def _compressed(matrix: Tensor, make: Any) -> Tensor:
    """The same with int32 indices: half the memory traffic of int64."""
    made: Tensor = make(
        matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values(), size=tuple(matrix.shape)
    )
    return made


def _parts(matrix: Tensor) -> dict[str, Tensor]:
    return {"crow": matrix.crow_indices(), "columns": matrix.col_indices(), "values": matrix.values()}
