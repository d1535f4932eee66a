"""LPViT: budgets, named blocks, bad input, and that it finds what matters."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.allocate import energy_table
from layerwise.engine import compress
from layerwise.errors import BudgetError, ConfigError, ModelError, ScoreError, ShapeError
from layerwise.methods import LPViT, Uniform
from layerwise.methods.block_costs import costs_of
from layerwise.plan import Plan
from layerwise.solvers import Magnitude, SparseGPT, Wanda
from layerwise.structure import as_matrices, parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for

BLOCK = "block(8x8)"


def data_for(name, model, count=2):
    batches = [inputs_for(name, model, batch=4, seed=seed) for seed in range(count)]
    if "pixel_values" in batches[0]:
        batches = [{**batch, "labels": torch.tensor([1, 0, 1, 1])} for batch in batches]
    return Batches(tuple(batches), {})


def kept_of(plan, structure):
    return {
        layer.name: plan.layers[layer.name].prune.blocks_kept(layer.size // 64).count(True)
        for layer in structure
        if layer.name in plan.layers
    }


def costs_for(model, data, structure, table="float16"):
    return costs_of(model, data[0], structure.layers, structure, (8, 8), energy_table(table))


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2"])
@pytest.mark.parametrize("cost", ["macs", "weights", "bytes", "energy"])
def test_the_budget_holds_and_no_block_can_be_put_back(name, cost):
    model = MODELS[name]()
    data, structure = data_for(name, model), structure_of(MODELS[name]())
    costs = costs_for(model, data, structure)
    for sparsity in (0.0, 0.3, 0.6):
        if cost == "energy" and sparsity > 0.3:
            continue  # what activations take is not less for fewer blocks
        plan = LPViT(sparsity=sparsity, pattern=BLOCK, cost=cost).plan(model, data, structure=structure)
        plan.check(structure.layers, fingerprint=structure.fingerprint)
        kept = kept_of(plan, structure)
        spent, allowed = costs.of_kept(cost, kept), (1 - sparsity) * costs.total(cost)
        assert spent <= allowed * (1 + 1e-9)
        gone = [costs.each(cost)[one] for one in kept if kept[one] < costs.blocks[one]]
        assert spent + min(gone, default=float("inf")) > allowed - 64 * (cost == "weights")
        if cost == "macs":
            assert plan.budget.flops == pytest.approx(2 * allowed)
        assert any("by the energy model" in note for note in plan.notes)


def test_a_shared_table_of_your_own_moves_the_choice(tmp_path):
    """Where only the places of blocks cost, all blocks cost alike; where only multiply-adds do, patches outweigh the pooler."""
    model = MODELS["vit"]()
    data, structure = data_for("vit", model), structure_of(MODELS["vit"]())
    (tmp_path / "places.yaml").write_text("mac: 0\nsram: 0\ndram: 1\nbytes: 0\nindex_bytes: 8\n")
    plan = LPViT(sparsity=0.5, pattern=BLOCK, cost="energy", energy_table=str(tmp_path / "places.yaml")).plan(
        model, data, structure=structure
    )
    kept = kept_of(plan, structure)
    assert sum(kept.values()) == sum(costs_for(model, data, structure).blocks.values()) // 2


def test_energy_in_the_worth_takes_less_energy_for_the_same_macs():
    model = MODELS["swin"]()
    data, structure = data_for("swin", model), structure_of(MODELS["swin"]())
    costs = costs_for(model, data, structure)
    spent = []
    for share in (0.0, 1.0):
        plan = LPViT(sparsity=0.4, pattern=BLOCK, energy=share).plan(model, data, structure=structure)
        kept = kept_of(plan, structure)
        assert costs.of_kept("macs", kept) <= 0.6 * costs.total("macs") * (1 + 1e-9)
        spent.append(costs.of_kept("energy", kept))
    assert spent[1] <= spent[0]


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT()])
def test_any_solver_takes_out_the_blocks_that_the_plan_names(solver):
    model = MODELS["timm_vit"]()
    data, structure = data_for("timm_vit", model), structure_of(MODELS["timm_vit"]())
    plan = Plan.from_text(LPViT(sparsity=0.5, pattern=BLOCK).plan(model, data).to_yaml())
    result = compress(model, plan, solver=solver, data=data)
    assert result.zeros == sum(plan.zeros(structure.layers).values())
    for layer in structure:
        weight = as_matrices(parameter_of(model, layer).detach(), layer)
        grid = weight.reshape(layer.rows // 8, 8, layer.columns // 8, 8).ne(0)
        kept = plan.layers[layer.name].prune.blocks_kept(layer.size // 64)
        assert grid.any(3).any(1).flatten().tolist() == kept
        assert grid.all(3).all(1).flatten().tolist() == kept


def test_convolutions_in_groups_and_experts_are_blocks_too():
    for name, pattern in (("mixtral", "block(8x8)"), ("convnext", "block(4x1)")):
        model = MODELS[name]()
        data = data_for(name, model)
        method = LPViT(sparsity=0.4, pattern=pattern, cost="weights", indivisible="dense")
        plan = method.plan(model, data)
        structure = structure_of(model)
        compress(model, plan, solver=Magnitude())
        zeros = {one.name: int((parameter_of(model, one) == 0).sum()) for one in structure if one.name in plan.layers}
        assert zeros == plan.zeros(structure.layers)


@pytest.mark.parametrize("solver", [Magnitude(), SparseGPT()])
def test_a_budget_that_takes_nothing_leaves_every_bit(solver):
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = -0.0
    before = copy.deepcopy(model.state_dict())
    plan = LPViT(sparsity=0.0, pattern=BLOCK).plan(model, data)
    assert all(set(entry.prune.kept) == {"x", "f"} for entry in plan.layers.values())
    compress(model, plan, solver=solver, data=data)
    for key, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[key].view(torch.int32))


def test_dead_block_rows_are_reported():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[8:24] = 0  # no sample's loss feels them, so they go first
    plan = LPViT(sparsity=0.3, pattern=BLOCK).plan(model, data)
    result = compress(model, plan, solver=Magnitude())
    note = next(note for note in result.notes if note.startswith("blocks.0.mlp.fc1"))
    assert "block rows have no block left" in note
    assert "outputs are their bias alone" in note
    kept = plan.layers["blocks.0.mlp.fc1"].prune.blocks_kept(32)
    assert not any(kept[4:12])


def test_half_of_what_matters_stays():
    """A layer whose second half of inputs is multiplied by zero later loses that half first."""
    torch.manual_seed(0)

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return x + self.fc2(self.fc1(self.norm(x)).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.Sequential(Unit(), Unit()), nn.Linear(16, 3)

        def forward(self, pixel_values):
            return self.head(self.blocks(pixel_values))

    with torch.random.fork_rng():
        model = Net().eval()
    with torch.no_grad():
        for unit in model.blocks:
            unit.fc2.weight[:, 8:] *= 1e-4
            unit.fc2.weight[:, 8:] += 0
            unit.fc1.weight[8:] *= 10  # magnitude would keep them
    batch = {
        "pixel_values": torch.randn(16, 16, generator=torch.Generator().manual_seed(0)),
        "labels": torch.arange(16) % 3,
    }
    plan = LPViT(sparsity=0.5, pattern="block(8x4)", max_sparsity=1.0).plan(model, Batches((batch,), {}))
    for index in range(2):
        assert plan.layers[f"blocks.{index}.fc1"].prune.blocks_kept(8) == [True] * 4 + [False] * 4
    wrong = Uniform(sparsity=0.5, pattern="block(8x4)").plan(model)
    errors = []
    for one in (plan, wrong):
        pruned = copy.deepcopy(model)
        compress(pruned, one, solver=Magnitude())
        errors.append(float((pruned(batch["pixel_values"]) - model(batch["pixel_values"])).square().mean().detach()))
    assert errors[0] < 0.1 * errors[1]


def test_reference_is_the_official_rule():
    model = MODELS["timm_vit"]()
    data, structure = data_for("timm_vit", model), structure_of(MODELS["timm_vit"]())
    plan = LPViT(sparsity=0.5, pattern=BLOCK, reference=True).plan(model, data)
    kept, costs = kept_of(plan, structure), costs_for(model, data, structure)
    assert costs.of_kept("macs", kept) == pytest.approx(0.5 * costs.total("macs"), abs=0.04 * costs.total("macs"))
    assert all(one >= 1 for one in kept.values())
    powered = LPViT(sparsity=0.5, pattern=BLOCK, reference=True, energy=1.0).plan(model, data)
    assert powered.layers != plan.layers
    assert LPViT(sparsity=0.5, pattern=BLOCK).plan(model, data).layers != plan.layers


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("block(8x8)", 0.5), ("block(16x16)", 0.6), ("block(32x32)", 0.3), ("block(16x32)", 0.6)]
)
def test_reference_keeps_its_budget_in_whole_blocks(pattern, sparsity):
    model = MODELS["timm_vit"]()
    data, structure = data_for("timm_vit", model), structure_of(MODELS["timm_vit"]())
    plan = LPViT(sparsity=sparsity, pattern=pattern, reference=True, indivisible="dense").plan(model, data)
    each = costs_for(model, data, structure).each("macs")
    macs = {layer.name: each[layer.name] * layer.size for layer in structure if layer.name in plan.layers}
    kept = sum(macs[name] * (1 - layer.prune.sparsity) for name, layer in plan.layers.items())
    assert kept / sum(macs.values()) == pytest.approx(1 - sparsity, abs=0.02 + 1e-9)


def test_a_reference_budget_that_blocks_are_too_large_for_is_said():
    model = MODELS["timm_vit"]()
    with pytest.raises(BudgetError, match=r"equal slopes keep .* take smaller blocks"):
        LPViT(sparsity=0.6, pattern="block(32x32)", reference=True, indivisible="dense").plan(
            model, data_for("timm_vit", model)
        )


def test_losses_with_and_without_labels():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    bare = Batches(tuple({"pixel_values": batch["pixel_values"]} for batch in data), {})
    plan = LPViT(sparsity=0.5, pattern=BLOCK, target="outputs").plan(model, bare)
    assert plan.layers == LPViT(sparsity=0.5, pattern=BLOCK, target="outputs").plan(model, data).layers
    assert plan.layers != LPViT(sparsity=0.5, pattern=BLOCK).plan(model, data).layers


def test_blocks_that_do_not_divide():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with pytest.raises(ShapeError, match=r'does not divide 4 of 8 layers .*"blocks.0.mlp.fc1"|does not divide'):
        LPViT(pattern="block(48x8)").plan(model, data)
    plan = LPViT(pattern="block(48x8)", indivisible="dense").plan(model, data)
    assert {name.rpartition(".")[2] for name in plan.layers} == {"qkv"}
    assert any("stay dense" in note for note in plan.notes)
    with pytest.raises(ShapeError, match="divides none of the 8 layers"):
        LPViT(pattern="block(7x7)", indivisible="dense").plan(model, data)


def test_zero_statistics_are_said_and_the_solver_chooses():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with torch.no_grad():
        model.head.weight.zero_()
    plan = LPViT(sparsity=0.5, pattern=BLOCK).plan(model, data)
    assert any("no sample's loss depends on any block" in note for note in plan.notes)
    assert all(entry.prune.kept is None for entry in plan.layers.values())
    assert {round(entry.prune.sparsity, 1) for entry in plan.layers.values()} == {0.5}


def test_a_layer_without_gradient_goes_first_and_is_named():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()  # what comes before it cannot be felt
    plan = LPViT(sparsity=0.3, pattern=BLOCK).plan(model, data)
    assert any("change no sample's loss" in note for note in plan.notes)
    assert plan.layers["blocks.1.mlp.fc2"].prune.sparsity == pytest.approx(0.95, abs=1 / 32)


def test_numbers_that_are_not_finite_are_refused():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = torch.inf
    with pytest.raises(ScoreError, match="loss is nan"):
        LPViT(pattern=BLOCK).plan(model, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = MODELS["timm_vit"]().to(dtype)
    data = data_for("timm_vit", model)
    data = Batches(tuple({**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in data), {})
    plan = LPViT(sparsity=0.5, pattern=BLOCK).plan(model, data)
    result = compress(model, plan, solver=Magnitude())
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"pattern": "2:4"}, 'pattern="2:4": give a block'),
        ({"pattern": "unstructured"}, "give a block"),
        ({"pattern": "block(0x4)"}, "give a block"),
        ({"cost": "time"}, "cost="),
        ({"energy": 1.5}, "energy=1.5"),
        ({"samples": 0}, "samples=0"),
        ({"target": "labels"}, "target="),
        ({"order": "best"}, "order="),
        ({"indivisible": "skip"}, "indivisible="),
        ({"reference": True, "cost": "bytes"}, "cost=bytes"),
    ],
)
def test_bad_settings_are_refused(bad, words):
    with pytest.raises(ConfigError) as caught:
        LPViT(**bad)
    assert words in str(caught.value)


def test_what_cannot_be_saved_is_said():
    model = MODELS["timm_vit"]()
    data = data_for("timm_vit", model)
    with pytest.raises(BudgetError, match=r"of the macs can go \(max_sparsity=0\.3\), target 0\.5"):
        LPViT(sparsity=0.5, pattern=BLOCK, max_sparsity=0.3).plan(model, data)
    with pytest.raises(BudgetError, match=r"of the energy can go .* moved all the same\), target 0\.9"):
        LPViT(sparsity=0.9, pattern=BLOCK, cost="energy").plan(model, data)
    with pytest.raises(BudgetError, match=r"Raise max_sparsity to 0\.5"):
        LPViT(sparsity=0.5, pattern=BLOCK, cost="weights", max_sparsity=0.3).plan(model, data)


def test_a_model_that_is_not_in_memory_is_refused():
    model = MODELS["timm_vit"]()
    with pytest.raises(ModelError, match="LPViT needs the whole model in memory"):
        LPViT(pattern=BLOCK).plan(model.to("meta"), data_for("timm_vit", model))


def test_both_ways_to_write_a_block_are_one():
    assert (
        LPViT(pattern="block:8x8").plan(model := MODELS["timm_vit"](), data := data_for("timm_vit", model)).layers
        == LPViT(pattern=BLOCK).plan(model, data).layers
    )


@settings(deadline=None, max_examples=15)
@given(st.floats(0.0, 0.8), st.floats(0.0, 0.8))
def test_a_smaller_budget_only_takes_more_blocks(one, two):
    """With one order for all budgets and hulls, what is kept at the higher sparsity is kept at the lower but for the last block."""
    less, more = sorted((one, two))
    kept = {}
    for sparsity in (less, more):
        plan = LPViT(sparsity=sparsity, pattern="block(16x16)").plan(VIT, VIT_DATA)
        kept[sparsity] = [bit for entry in plan.layers.values() for bit in (entry.prune.blocks_kept(1024) or [])]
    grown = sum(a and not b for a, b in zip(kept[more], kept[less]))
    assert grown <= 1


VIT = MODELS["timm_vit"]()
VIT_DATA = data_for("timm_vit", VIT)
