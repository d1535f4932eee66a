"""Block-sparse products against dense ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.errors import ConfigError, ModelError, SelectionError, ShapeError
from layerwise.io import BlockSparseLinear, block_sparse_on_cpu
from layerwise.io.block_sparse import blocks_in


def blocky(rows, columns, block, density, seed=0, bias=True):
    draw = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    keep = torch.rand(rows // block[0], columns // block[1], generator=draw) < density
    mask = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=draw) * mask)
        if bias:
            linear.bias.copy_(torch.randn(rows, generator=draw))
    return linear.requires_grad_(False), keep


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_gathering_and_bsr_give_the_dense_numbers(block, density):
    linear, keep = blocky(256, 192, (block, block), density)
    x = torch.randn(3, 50, 192, generator=torch.Generator().manual_seed(1))
    dense = linear(x)
    assert torch.equal(blocks_in(linear.weight, (block, block)), keep)
    assert (BlockSparseLinear(linear, (block, block))(x) - dense).abs().max() < 1e-3
    bsr = linear.weight.to_sparse_bsr((block, block))
    assert (F.linear(x.flatten(0, 1), bsr, linear.bias).view_as(dense) - dense).abs().max() < 1e-3


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_empty_and_full(density, bias):
    linear, _ = blocky(8, 12, (2, 3), density, bias=bias)
    sparse = BlockSparseLinear(linear, (2, 3))
    assert sparse.density == density
    for shape in ((12,), (1, 12), (2, 0, 12)):
        x = torch.ones(shape)
        torch.testing.assert_close(sparse(x), linear(x))


def test_half_precision():
    linear, _ = blocky(32, 32, (8, 8), 0.5)
    half = linear.bfloat16()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(BlockSparseLinear(half, (8, 8))(x), half(x), rtol=0.05, atol=0.1)


def test_only_linears_that_are_sparse_enough_are_replaced():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(7, 8)})
    with torch.no_grad():
        model["a"].weight[:, 4:] = 0
    block_sparse_on_cpu(model, (4, 4))
    assert [type(model[name]) for name in "abc"] == [BlockSparseLinear, nn.Linear, nn.Linear]
    with pytest.raises(SelectionError, match="no linear has at most 50%"):
        block_sparse_on_cpu(model, (4, 4))
    block_sparse_on_cpu(model, (4, 4), density=1.0)
    assert type(model["b"]) is BlockSparseLinear


def test_bad_requests_are_refused():
    with pytest.raises(ShapeError, match="8x8 does not split into blocks of 3x4"):
        BlockSparseLinear(nn.Linear(8, 8), (3, 4))
    with pytest.raises(ConfigError, match="density=2"):
        block_sparse_on_cpu(nn.Linear(8, 8), (4, 4), density=2)
    with pytest.raises(ModelError, match="not on the CPU"):
        block_sparse_on_cpu(nn.Linear(8, 8, device="meta"), (4, 4))
