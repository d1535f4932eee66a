"""Prune a vision transformer in blocks of weights under a budget of energy, and win the accuracy back with the dense model as teacher.

    python examples/block_vit.py

A small ViT learns scikit-learn's digits, loses 8 x 8 blocks where its loss feels them least (LPViT, arXiv:2407.02068), is fine-tuned with
those blocks held at zero, and runs them as smaller dense products. Coefficients of the energy model can be your own, in a file.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.evaluate import accuracy
from layerwise.recover import Distillation, fine_tune, masks_of, warm_cosine
from layerwise.tasks import images


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim, 4)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """(batch, 1, 8, 8) -> ten numbers."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def main(epochs: int = 16, tuning: int = 4, sparsity: float = 0.4) -> dict[str, float]:
    """Returns accuracies on images that were held out: dense, pruned, tuned, and of the block-sparse model."""
    train, test = (
        images("digits", mean=(0.3,), std=(0.38,), batch=64, split=split) for split in ("calibration", "held-out")
    )
    dense = ViT()
    optimizer = torch.optim.AdamW(dense.parameters(), 4e-3)
    fine_tune(dense, train, optimizer, epochs=epochs, schedule=warm_cosine(optimizer, epochs * len(train)), clip=1.0)
    found = {"dense": accuracy(dense, test).top1}

    # energy counts what activations move too, so that less of it can go than of multiply-adds
    method = lw.methods.LPViT(sparsity=sparsity, pattern="block(8x8)", cost="energy", energy_table="float32")
    plan = method.plan(dense, train)
    print(*plan.notes, sep="\n")
    model = copy.deepcopy(dense)
    result = lw.compress(
        model, plan, solver=lw.solvers.SparseGPT(), data=train
    )  # the blocks that stay make up for the rest
    print(*result.notes, sep="\n")  # outputs that have no block left
    found["pruned"] = accuracy(model, test).top1

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fine_tune(model, train, optimizer, epochs=tuning, keep=masks_of(model), loss=Distillation(dense), clip=1.0)
    found["tuned"] = accuracy(model, test).top1
    fast, report = lw.fastest(model, {name: value for name, value in test[0].items() if name != "labels"})
    print(report.summary())  # matrices as small as these are fastest dense
    found["fastest form"] = accuracy(fast, test).top1
    for name, value in found.items():
        print(f"{name:12} {value:.1%}")
    return found


if __name__ == "__main__":
    main()
