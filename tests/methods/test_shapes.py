"""Methods that look at shapes alone: uniform+, ER, ERK, ERK+; and random, which looks at names."""

import pytest
import torch

from layerwise.errors import BudgetError, SelectionError
from layerwise.methods import ER, ERK, ERKPlus, RandomRatios, UniformPlus
from layerwise.structure import structure_of
from models import MODELS, CifarResNet


def densities(plan):
    return {name: 1 - entry.prune.sparsity for name, entry in plan.layers.items()}


def resnet20():
    """Width 16, three blocks a stage: 270 896 weights with stem, shortcuts and classifier."""
    model = CifarResNet(width=16, blocks=3)
    structure = structure_of(model, include=["*"])
    assert sum(layer.size for layer in structure) == 270_896
    return model, structure


def test_erk_on_resnet20_worked_by_hand():
    model, structure = resnet20()
    got = densities(ERK(sparsity=0.9).plan(model, structure=structure))
    expected = {
        "conv1": 0.982985,
        "layer1.0.conv1": 0.280151,
        "layer2.1.conv1": 0.129017,
        "layer3.1.conv2": 0.061744,
        "layer2.0.shortcut.0": 1,
        "layer3.0.shortcut.0": 0.812806,
        "fc": 1,
    }
    sizes = {layer.name: layer.size for layer in structure}
    for name, density in expected.items():  # up to the weight that rounding moves
        assert got[name] == pytest.approx(density, abs=1 / sizes[name] + 1e-6), name


def test_uniform_plus_on_resnet20_worked_by_hand():
    model, structure = resnet20()
    got = densities(UniformPlus(sparsity=0.9).plan(model, structure=structure))
    assert got["conv1"] == 1
    assert got["fc"] == pytest.approx(0.2, abs=1e-12)  # 512 of 640 go
    assert got["layer3.0.conv2"] == pytest.approx(0.098322, abs=3e-5)


def test_er_looks_past_the_kernel():
    model, structure = resnet20()
    er, erk = (densities(m(sparsity=0.9).plan(model, structure=structure)) for m in (ER, ERK))
    assert er["layer3.1.conv2"] != pytest.approx(erk["layer3.1.conv2"], abs=1e-3)
    llama = MODELS["llama"]()
    assert ER(sparsity=0.5).plan(llama).layers == ERK(sparsity=0.5).plan(llama).layers  # matrices: one and the same


def test_erk_power_zero_is_uniform():
    got = densities(ERK(sparsity=0.75, power=0).plan(MODELS["llama"]()))
    assert list(got.values()) == pytest.approx([0.25] * len(got))


def test_experts_count_as_matrices():
    """Of 4 experts of 64 x 32 each has the density of one linear of that shape."""
    got = densities(ERK(sparsity=0.5).plan(MODELS["mixtral"]()))
    layers = {layer.name: layer for layer in structure_of(MODELS["mixtral"]()).layers}
    experts = next(layer for layer in layers.values() if layer.kind == "experts")
    q = next(layer for layer in layers.values() if layer.role == "q")
    raw = {layer.name: (layer.rows + layer.columns) / (layer.rows * layer.columns) for layer in (experts, q)}
    assert got[experts.name] / got[q.name] == pytest.approx(raw[experts.name] / raw[q.name], rel=1e-2)


def test_the_ends_are_found_by_the_order_of_the_model():
    model, structure = resnet20()
    assert structure.layers[0].name != "conv1"  # the structure lists what is outside blocks last
    assert densities(UniformPlus(sparsity=0.5).plan(model, structure=structure))["conv1"] == 1
    llama = MODELS["llama"]()
    got = densities(UniformPlus(sparsity=0.5).plan(llama))
    assert [name for name, density in got.items() if density == 1] == ["model.layers.0.self_attn.q_proj"]
    head = structure_of(llama, include=["*_proj", "lm_head"])
    got = densities(ERKPlus(sparsity=0.5).plan(llama, structure=head))
    assert got["lm_head"] == 1
    assert got["model.layers.1.mlp.down_proj"] < 1  # the last in blocks, and not the head


class HeadFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(8, 20)
        self.blocks = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))

    def forward(self, x):
        return self.lm_head(self.blocks(x))


def test_the_head_is_the_last_layer_wherever_it_is_registered():
    model = HeadFirst()
    structure = structure_of(model, include=["*.linear?", "lm_head"])
    got = densities(ERKPlus(sparsity=0.5).plan(model, structure=structure))
    assert [name for name, density in got.items() if density == 1] == ["lm_head"]


def test_the_ends_can_be_named():
    model = MODELS["llama"]()
    first, last = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"
    got = densities(UniformPlus(sparsity=0.75, first=first, last=last, last_density=0.5).plan(model))
    assert (got[first], got[last]) == (1, 0.5)
    with pytest.raises(
        SelectionError, match=r'none of the 14 layers. The nearest name is "model.layers.1.mlp.up_proj"'
    ):
        UniformPlus(first="model.layers.1.mlp.up").plan(model)


def test_erk_plus_keeps_dense_what_it_is_told_and_says_what_is_feasible():
    model = MODELS["llama"]()
    got = densities(ERKPlus(sparsity=0.5, dense="*.v_proj").plan(model))
    assert {name for name, density in got.items() if density == 1} == {
        f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)
    }
    with pytest.raises(SelectionError, match=r'dense="\*.w_proj" matches none of the 14 layers'):
        ERKPlus(dense="*.w_proj").plan(model)
    with pytest.raises(
        BudgetError, match=r"2 of 14 layers stay dense\), target 99 %. Lower the sparsity to 0\.\d+, or let fewer"
    ):
        ERKPlus(sparsity=0.99, dense="*.v_proj").plan(model)


def test_random_draws_depend_on_the_seed_and_the_name_alone():
    model = MODELS["llama"]()
    plans = {seed: RandomRatios(sparsity=0.5, seed=seed).plan(model) for seed in range(20)}
    assert len({plan.to_yaml() for plan in plans.values()}) == 20
    values = torch.tensor([[e.prune.sparsity for e in plan.layers.values()] for plan in plans.values()])
    assert 0.042 < values.std() < 0.05  # uniform of half width 0.08 has deviation 0.0462
    assert (values.mean(0) - 0.5).abs().max() < 0.05  # no layer is favoured
    fewer = RandomRatios(sparsity=0.5).plan(model, structure=structure_of(model, exclude=["*.q_proj"]))
    shift = {plans[0].layers[name].prune.sparsity - entry.prune.sparsity for name, entry in fewer.layers.items()}
    assert max(shift) - min(shift) < 0.01  # the same draws, moved alike
    assert RandomRatios(sparsity=0.5, spread=0.0).plan(model).budget.achieved == 0.5
