"""A ViT trained on scikit-learn's digits, then pruned in blocks: what is promised of LPViT, measured."""

import copy

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.evaluate import accuracy
from layerwise.methods import LPViT, Uniform
from layerwise.recover import Distillation, fine_tune, masks_of, warm_cosine
from layerwise.solvers import Magnitude, SparseGPT
from layerwise.tasks import images
from models import TimmBlock


class DigitsViT(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock(dim, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, pixel_values):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def data_of(split):
    return images("digits", mean=(0.3,), std=(0.38,), batch=64, split=split)


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsViT()
    data = data_of("calibration")
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    fine_tune(model, data, optimizer, epochs=16, schedule=warm_cosine(optimizer, 16 * len(data)), clip=1.0)
    return model.eval(), data, data_of("held-out")


def pruned(model, plan, data, solver=None):
    other = copy.deepcopy(model)
    lw.compress(other, plan, solver=solver or Magnitude(), data=data)
    return other


@pytest.mark.parametrize("block", ["block(8x8)", "block(4x16)"])
def test_closer_to_the_dense_model_than_uniform_and_magnitude_at_the_same_macs(trained, block):
    model, data, held_out = trained
    assert accuracy(model, held_out).top1 > 0.9
    found = {}
    for name, method in (("uniform", Uniform), ("lpvit", LPViT)):
        plan = method(sparsity=0.4, pattern=block).plan(model, data)
        found[name] = accuracy(pruned(model, plan, data), held_out).top1
    assert found["lpvit"] > found["uniform"] + 0.05
    plan = LPViT(sparsity=0.4, pattern=block).plan(model, data)
    assert accuracy(pruned(model, plan, data, SparseGPT()), held_out).top1 >= found["lpvit"] - 0.02


def test_fine_tuning_with_a_teacher_and_held_masks_wins_it_back(trained):
    model, data, held_out = trained
    dense = accuracy(model, held_out).top1
    small = pruned(model, LPViT(sparsity=0.6, pattern="block(8x8)").plan(model, data), data)
    before, keep = accuracy(small, held_out).top1, masks_of(small)
    optimizer = torch.optim.AdamW(small.parameters(), 2e-3)
    fine_tune(small, data, optimizer, epochs=2, keep=keep, loss=Distillation(model), clip=1.0)
    after = accuracy(small, held_out).top1
    assert after > before + 0.1
    assert after > dense - 0.06
    assert all(not parameter[~keep[name]].any() for name, parameter in small.named_parameters() if name in keep)
