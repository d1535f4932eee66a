"""Random masks of exact counts and the initialisation of dense layers, both from a stream for each layer."""

import pytest
import torch
from torch import nn

from layerwise.engine import Settings, compress
from layerwise.methods import ER, ERK, ERKPlus, Uniform, UniformPlus
from layerwise.recover import kaiming_normal, random_masks
from layerwise.solvers import Random
from layerwise.structure import structure_of
from models import MODELS, CifarResNet


def resnet(width=4):
    model = CifarResNet(width, 1)
    return model, structure_of(model, include=["*"])


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("method", [Uniform, UniformPlus, ER, ERK, ERKPlus])
def test_exactly_the_budget_is_kept(method, density):
    model = CifarResNet(16, 1)
    structure = structure_of(model, include=["*"])
    settings = {"dense": "conv1"} if method is ERKPlus else {}
    plan = method(sparsity=1 - density, **settings).plan(model, structure=structure)
    keep = random_masks(plan, structure, seed=17)
    total = sum(layer.size for layer in structure)
    assert sum(int(mask.sum()) for mask in keep.values()) == total - round((1 - density) * total)
    again, other = random_masks(plan, structure, seed=17), random_masks(plan, structure, seed=18)
    assert all(torch.equal(again[name], mask) for name, mask in keep.items())
    assert any(not torch.equal(other[name], mask) for name, mask in keep.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "convnext"])
def test_they_are_the_masks_of_the_solver(name):
    """Fused experts, transposed storage, depthwise convolutions."""
    model = MODELS[name]()
    structure = structure_of(model)
    plan = ERK(sparsity=0.7).plan(model, structure=structure)
    keep = random_masks(plan, structure, seed=3)
    compress(model, plan, solver=Random(), settings=Settings(seed=3))
    for layer in structure:
        assert torch.equal(model.get_parameter(layer.parameter) != 0, keep[layer.name])


def test_a_pattern_is_kept():
    model = MODELS["llama"]()
    structure = structure_of(model)
    keep = random_masks(Uniform(pattern="2:4").plan(model, structure=structure), structure)
    for mask in keep.values():
        assert (mask.reshape(len(mask), -1, 4).sum(-1) == 2).all()


def test_a_change_of_one_layers_shape_leaves_the_others_masks_alone():
    model, structure = resnet()
    keep = random_masks(Uniform(sparsity=0.5).plan(model, structure=structure), structure)
    model.fc = nn.Linear(16, 7)
    changed = structure_of(model, include=["*"])
    other = random_masks(Uniform(sparsity=0.5).plan(model, structure=changed), changed)
    for layer in structure:
        if layer.name != "fc":
            assert torch.equal(keep[layer.name], other[layer.name])
    state = torch.get_rng_state()
    random_masks(Uniform(sparsity=0.5).plan(model, structure=changed), changed)
    assert torch.equal(torch.get_rng_state(), state)


def test_kaiming_is_that_of_the_dense_layer():
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(400, 300))
    structure = structure_of(model, include=["*"])
    state = torch.get_rng_state()
    kaiming_normal(model, structure, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.02)
    assert model[1].weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert not model[0].bias.any()
    first = model[1].weight.clone()
    model[0] = nn.Conv2d(3, 4, 3)
    kaiming_normal(model, structure_of(model, include=["*"]), seed=5)
    assert torch.equal(model[1].weight, first)
    kaiming_normal(model, structure_of(model, include=["*"]), seed=6)
    assert not torch.equal(model[1].weight, first)
