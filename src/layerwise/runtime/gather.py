"""Zeros that groups of rows have in common, on any device: gather the inputs that a group needs, multiply a small dense matrix.

PyTorch's block-sparse kernels for CPUs are slower than dense products until few blocks are left; this takes blocks of any width, of sizes
that do not divide, and columns pruned for several rows at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .forms import Form
from .zeros import needed_columns, zeros_of

FEW = 8  # rows of input below which groups are multiplied without turning the inputs
WIDTHS = (64, 32, 16, 8, 4, 2)  # columns that are gathered as one
GATHERED = 2**20  # bytes of gathered input at once on a CPU
ON_GPU = 2**28  # the same on an accelerator, where only memory limits it
WASTE = 1.25  # groups that share a batched product may be padded to this times what they need


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
        in_place = torch.equal(source, rows) and len(order) * self.height == self.out_features
        self.source = None if in_place else source.int()

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

    def dense(self) -> Tensor:
        """(outputs, inputs), put together from the groups."""
        groups = -(-self.out_features // self.height)
        whole = torch.zeros(
            groups, self.height, self.in_features // self.width, self.width, dtype=self.dtype, device=self.device
        )
        start = 0
        for runs, kept in self.buckets:
            some = whole[start : start + len(runs)]
            chosen = runs.long()[:, None, :, None].expand(-1, self.height, -1, self.width)
            some.scatter_(2, chosen, kept.transpose(1, 2).reshape(chosen.shape))
            start += len(runs)
        rows = whole.view(-1, self.in_features)
        return rows if self.source is None else rows[self.source]

    def parts(self) -> dict[str, Tensor]:
        found = {} if self.source is None else {"source": self.source}
        for at, (runs, kept) in enumerate(self.buckets):
            found |= {f"{at}.runs": runs, f"{at}.kept": kept}
        return found

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups of {self.height} rows"


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
