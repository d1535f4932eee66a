"""Run linears pruned in blocks on a CPU: for each row of blocks the inputs it needs are gathered, and one small dense product is made.

PyTorch's own block-sparse tensors (BSR) give the same numbers and are far slower than dense on a CPU. Whether this is faster depends on
density, shapes and machine: measure it (`evaluate.latency`). For speed alone; nothing of it is saved.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, SelectionError, ShapeError


class BlockSparseLinear(nn.Module):
    """A linear without its blocks that are all zero. block: (outputs, inputs), which must divide the weight. Inference alone."""

    def __init__(self, linear: nn.Linear, block: tuple[int, int]) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.block = linear.in_features, linear.out_features, block
        kept = blocks_in(weight, block)
        self.density = float(kept.float().mean())
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.dtype, (height, width) = weight.dtype, block
        within = torch.arange(width)
        self.parts: list[tuple[slice, Tensor, Tensor]] = []  # outputs, inputs that are gathered, their weights
        for row, columns in enumerate(kept):
            if columns.any():
                chosen = (columns.nonzero() * width + within).flatten()
                outputs = slice(row * height, (row + 1) * height)
                self.parts.append((outputs, chosen, weight[outputs, chosen].contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features).T.contiguous()
        result = tokens.new_zeros(self.out_features, tokens.shape[1])
        for outputs, inputs, weight in self.parts:
            torch.mm(weight, tokens.index_select(0, inputs), out=result[outputs])
        if self.bias is not None:
            result += self.bias.unsqueeze(1)
        return result.T.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, density={self.density:.3f}"


def blocks_in(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks have a weight that is not zero: (rows, columns) -> bool (block rows, block columns). Raises ShapeError."""
    (rows, columns), (height, width) = weight.shape, block
    if height < 1 or width < 1 or rows % height or columns % width:
        raise ShapeError(f"a weight of {rows}x{columns} does not split into blocks of {height}x{width}.")
    return weight.reshape(rows // height, height, columns // width, width).ne(0).any(3).any(1)


def block_sparse_on_cpu(
    model: nn.Module, block: tuple[int, int], *, density: float = 0.5, exclude: Iterable[str] = ()
) -> nn.Module:
    """Replace linears by block-sparse ones, in place, where the block divides them and at most `density` of the blocks hold anything.

    exclude: globs of names that stay. Returns the model, for inference. Raises ModelError off the CPU, SelectionError if there is no such
    linear, ConfigError for a density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"block_sparse_on_cpu: density={density:g}: give the most that may be kept, 0 to 1.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ModelError("block_sparse_on_cpu: the model is not on the CPU. Move it there first: model.cpu().")
    globs, chosen = tuple(exclude), dict[str, BlockSparseLinear]()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(fnmatchcase(name, glob) for glob in globs):
            fits = not (module.out_features % block[0] or module.in_features % block[1])
            if fits and float(blocks_in(module.weight.detach(), block).float().mean()) <= density:
                chosen[name] = BlockSparseLinear(module, block)
    if not chosen:
        raise SelectionError(
            f"block_sparse_on_cpu: no linear has at most {density:.0%} of its {block[0]}x{block[1]} blocks kept."
            " Prune it in such blocks first, or raise density."
        )
    for name, new in chosen.items():
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, new)
    return model
