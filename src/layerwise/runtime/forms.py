"""A linear in other forms, each a module that takes the place of the linear: zeros left out, in the way a kernel wants it.

For inference alone: nothing here has a gradient, and a form stays on the device and in the dtype that it was made for. All give the product
with the dense matrix up to the order of summation; where an input is infinite or NaN, a zero weight that is left out gives nothing, while a
dense product gives NaN.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError, ShapeError
from .zeros import keeps_two_of_four, needed_columns, zeros_of

FEW = 8  # rows of input below which groups are multiplied without turning the inputs
WIDTHS = (64, 32, 16, 8, 4, 2)  # columns that are gathered as one
MAT_VEC = 1  # rows of input up to which a sparse matrix meets a vector: kernels for that are several times as fast
TILE = 32  # rows of input that go through a CSR product at once: more fall out of the cache
GATHERED = 2**20  # bytes of gathered input at once on a CPU
ON_GPU = 2**28  # the same on an accelerator, where only memory limits it
WASTE = 1.25  # groups that share a batched product may be padded to this times what they need


class Form(nn.Module, ABC):
    """A linear's stand-in: (..., in_features) -> (..., out_features), in the dtype that the linear had."""

    name: ClassVar[str]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = None if bias is None else bias.detach()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        result = self.product(flat)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*x.shape[:-1], self.out_features)

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

    @property
    def weight(self) -> Tensor:
        """The dense matrix, made anew at each call: for models that look at it."""
        return self.product(torch.eye(self.in_features, dtype=self.dtype, device=self.device)).t()

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

    def parts(self) -> dict[str, Tensor]:
        indices = {"rows": self.rows, "columns": self.columns}
        return {"kept": self.kept} | {name: part for name, part in indices.items() if part is not None}


class GatherLinear(Form):
    """Groups of rows, each with only the columns that it needs: gather these inputs, multiply a small dense matrix.

    Columns are gathered in runs of `width` where they are needed together. Groups that need about as many are padded to the same number
    and multiplied together, as many at a time as fit a cache.
    """

    name = "gather"

    def __init__(self, weight: Tensor, bias: Tensor | None, height: int | None = None) -> None:
        super().__init__(weight, bias)
        self.height = zeros_of(weight).height if height is None else height
        needed = needed_columns(weight != 0, self.height)
        self.width = _width(needed)
        needed = needed.reshape(len(needed), -1, self.width).any(2)
        padded = F.pad(weight.detach(), (0, 0, 0, -self.out_features % self.height))
        groups = padded.reshape(len(needed), self.height, -1, self.width)
        counts = needed.sum(1)
        order = counts.argsort(descending=True, stable=True)
        self.buckets: list[tuple[Tensor, Tensor]] = []  # runs (groups, most), weights (groups, most * width, height)
        for members in _alike(order, counts):
            most = int(counts[members[0]])
            if most:  # those behind need nothing at all
                # the runs that a group needs come first, in order; what it does not need is zero anyway
                runs = (~needed[members]).int().argsort(dim=1, stable=True)[:, :most]
                chosen = runs[:, None, :, None].expand(-1, self.height, -1, self.width)
                kept = groups[members].gather(2, chosen).flatten(2).transpose(1, 2)
                self.buckets.append((runs.int().contiguous(), kept.contiguous()))  # input by input: read in one go
        self.empty = (len(order) - sum(len(runs) for runs, _ in self.buckets)) * self.height
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        rows = torch.arange(self.out_features, device=order.device)
        source = place[rows // self.height] * self.height + rows % self.height
        self.source = None if torch.equal(source, rows) else source.int()

    def product(self, x: Tensor) -> Tensor:
        return self._few(x) if len(x) < FEW else self._many(x)

    def _few(self, x: Tensor) -> Tensor:
        """For few rows of input: no matrix is turned."""
        runs_of = x.reshape(len(x), -1, self.width)
        found = []
        for runs, kept in self.buckets:
            inputs = runs_of.index_select(1, runs.flatten()).view(len(x), len(runs), -1)
            found.append(torch.bmm(inputs.transpose(0, 1), kept).transpose(0, 1).flatten(1))
        result = _joined(found, x.new_zeros(len(x), self.empty), 1)
        return result if self.source is None else result.index_select(1, self.source)

    def _many(self, x: Tensor) -> Tensor:
        turned = x.t().contiguous().view(-1, self.width * len(x))  # gathering rows copies long runs of memory
        limit = GATHERED if x.device.type == "cpu" else ON_GPU
        found = []
        for runs, kept in self.buckets:
            at_once = max(1, limit // (kept.shape[1] * len(x) * x.element_size()))
            for some, weights in zip(torch.split(runs, at_once), torch.split(kept, at_once), strict=True):
                inputs = turned.index_select(0, some.flatten()).view(len(some), -1, len(x))
                found.append(torch.bmm(weights.transpose(1, 2), inputs).flatten(0, 1))
        result = _joined(found, x.new_zeros(self.empty, len(x)), 0)
        return (result if self.source is None else result.index_select(0, self.source)).t().contiguous()

    def parts(self) -> dict[str, Tensor]:
        found = {} if self.source is None else {"source": self.source}
        for at, (runs, kept) in enumerate(self.buckets):
            found |= {f"{at}.runs": runs, f"{at}.kept": kept}
        return found

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups of {self.height} rows"


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
            result = (self.matrix @ x[0])[None] if len(x) else x.new_zeros(0, self.out_features)
        elif x.device.type == "cpu":
            result = x.new_empty(len(x), self.out_features)
            for rows, some in zip(torch.split(result, TILE), torch.split(x, TILE), strict=True):
                rows.copy_((self.matrix @ some.t().contiguous()).t())
        else:
            result = (self.matrix @ x.t().contiguous()).t().contiguous()
        return result.to(self.dtype)

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

    def parts(self) -> dict[str, Tensor]:
        inner = ((name, getattr(self.matrix, name, None)) for name in ("packed", "meta"))
        return {name: part for name, part in inner if isinstance(part, Tensor)}


def _joined(found: list[Tensor], rest: Tensor, dim: int) -> Tensor:
    parts = [*found, *([rest] if rest.numel() or not found else [])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _width(needed: Tensor) -> int:
    """The longest aligned run of columns that every group (groups, columns) needs whole or not at all."""
    for width in WIDTHS:
        if needed.shape[1] % width == 0:
            runs = needed.reshape(len(needed), -1, width)
            if torch.equal(runs.any(2), runs.all(2)):
                return width
    return 1


def _alike(order: Tensor, counts: Tensor) -> list[Tensor]:
    """Cut groups in descending order of what they need where padding would cost more than WASTE."""
    sizes, start = [], 0
    sorted_counts = counts[order].tolist()
    for at, count in enumerate(sorted_counts):
        if sorted_counts[start] > WASTE * count and at > start:
            sizes.append(at - start)
            start = at
    return list(torch.split(order, [*sizes, len(order) - start]))


def _compressed(matrix: Tensor, make: Any) -> Tensor:
    """The same with int32 indices: half the memory traffic of int64."""
    made: Tensor = make(
        matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values(), size=tuple(matrix.shape)
    )
    return made


def _parts(matrix: Tensor) -> dict[str, Tensor]:
    return {"crow": matrix.crow_indices(), "columns": matrix.col_indices(), "values": matrix.values()}
