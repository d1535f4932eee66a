"""Measured curves: by hand, against pruning for real, and without a trace."""

import copy

import pytest
import torch

from layerwise.engine import compress
from layerwise.errors import ConfigError, ScoreError
from layerwise.methods import LPViT
from layerwise.methods.block_errors import measured_curves, through
from layerwise.methods.lpvit import prune_of
from layerwise.plan import Plan
from layerwise.solvers import Magnitude
from layerwise.structure import structure_of
from layerwise.tasks import Yardstick, undisturbed
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def data_for(name, model):
    batches = [inputs_for(name, model, batch=4, seed=seed) for seed in range(2)]
    if "pixel_values" in batches[0]:
        batches = [{**batch, "labels": torch.tensor([1, 0, 1, 1])} for batch in batches]
    return Batches(tuple(batches), {})


def test_between_points_the_curve_keeps_its_shape():
    assert through([0, 2, 4], [0.0, 1.0, 5.0], [0, 1, 4, 4, 4]) == [0.0, 0.25, 1.0, 3.0, 5.0]
    assert through([0, 1, 3], [0.0, 2.0, 1.0], [0, 1, 3, 2]) == [0.0, 2.0, 2.0, 2.0]  # what falls is level


@pytest.mark.parametrize("name", ["timm_vit", "convnext", "gpt2", "mixtral"])
def test_measured_is_the_divergence_of_the_pruned_model(name):
    model = MODELS[name]()
    data, structure = data_for(name, model), structure_of(model)
    layers = [layer for layer in structure if not layer.rows % 4 and not layer.columns % 4][:3]
    shape, blocks = (4, 4), {layer.name: layer.size // 16 for layer in layers}
    orders = {one: torch.randperm(n, generator=torch.Generator().manual_seed(n)) for one, n in blocks.items()}
    flat = {one: list(range(n + 1)) for one, n in blocks.items()}
    before = copy.deepcopy(model.state_dict())
    curves = measured_curves(model, data, layers, orders, flat, shape, 8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with undisturbed([model]):
        yardstick = Yardstick(model, list(data))
    for layer in layers:
        count = max(1, round(blocks[layer.name] / 2))
        pruned = copy.deepcopy(model)
        plan = Plan(layers={layer.name: prune_of("block(4x4)", orders[layer.name], count)})
        compress(pruned, plan, solver=Magnitude())
        with undisturbed([pruned]):
            found = yardstick.divergence(pruned)
        curve = curves[layer.name]
        assert len(curve) == blocks[layer.name] + 1
        assert curve == sorted(curve)
        assert curve[count] >= found - 1e-9
        if found >= max(curve[: count // 2 + 1]):
            assert curve[count] == pytest.approx(found, rel=1e-4, abs=1e-9)


def test_a_failure_puts_the_weight_back_and_names_the_layer(monkeypatch):
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Yardstick, "divergence", lambda self, model: float("inf"))
    with pytest.raises(ScoreError, match=r'layer "blocks\.0\.attn\.qkv"'):
        LPViT(pattern="block(8x8)", measured=4).plan(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_is_a_setting():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    plan = LPViT(sparsity=0.5, pattern="block(8x8)", measured=8).plan(model, data)
    assert plan.layers != LPViT(sparsity=0.5, pattern="block(8x8)").plan(model, data).layers
    assert plan == LPViT(sparsity=0.5, pattern="block(8x8)", measured=8).plan(model, data)
    with pytest.raises(ConfigError, match="measured=-1"):
        LPViT(measured=-1)
