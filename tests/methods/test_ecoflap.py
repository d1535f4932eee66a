import copy

import pytest
import torch
from torch import nn

from layerwise.allocate import exact_counts, proportional
from layerwise.engine import compress
from layerwise.errors import BudgetError, ConfigError, DataError, ModelError
from layerwise.methods import ECoFLaP, Uniform
from layerwise.methods import ecoflap as module
from layerwise.plan import Plan
from layerwise.scores import first_order_gradient, watched, zeroth_order_gradient
from layerwise.solvers import Magnitude, Wanda
from layerwise.structure import groups_of, structure_of, towers_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama


def batches_for(name, model, count=2):
    batches = [inputs_for(name, model, seed=seed) for seed in range(count)]
    if name in ("vit", "cifar_resnet"):
        batches = [batch | {"labels": torch.tensor([1, 0])} for batch in batches]
    return Batches(tuple(batches), {})


def scored(monkeypatch, values):
    """ECoFLaP as if the score of every layer were that of the first key that is part of its name."""

    def fake(model, data, structure, **_):
        return {layer.name: next(v for key, v in values.items() if key in layer.name) for layer in structure}

    monkeypatch.setattr(module, "zeroth_order_gradient", fake)


def sparsities(plan):
    return {name: entry.prune.sparsity for name, entry in plan.layers.items()}


def by_group(plan, structure, by):
    zeros, groups = plan.zeros(structure.layers), groups_of(structure, by)
    return {
        name: sum(zeros[layer.name] for layer in layers) / sum(layer.size for layer in layers)
        for name, layers in groups.items()
    }


def test_worked_by_hand(monkeypatch):
    """Two blocks of one size, S = .5, p = .6: floors of 40 %, and the other 20 % of all weights shared 3 : 1."""
    scored(monkeypatch, {"layers.0.": 3.0, "layers.1.": 1.0})
    model = MODELS["llama"]()
    plan = ECoFLaP(samples=4).plan(model, batches_for("llama", model))
    blocks = by_group(plan, structure_of(model), "block")
    assert blocks == pytest.approx({"model.layers.0": 0.45, "model.layers.1": 0.55}, abs=1e-4)
    assert plan.scores == {"model.layers.0": 21.0, "model.layers.1": 7.0}
    assert plan.notes == ()
    inside = [value for name, value in sparsities(plan).items() if "layers.0." in name]
    assert inside == pytest.approx([0.45] * 7, abs=1e-3)  # up to whole weights


def test_a_full_block_leaves_its_excess(monkeypatch):
    scored(monkeypatch, {"layers.0.": 99.0, "layers.1.": 1.0})
    model = MODELS["llama"]()
    plan = ECoFLaP(max_sparsity=0.9).plan(model, batches_for("llama", model))
    blocks = by_group(plan, structure_of(model), "block")  # floors .1, extra .8 of which .792 is less than room for .9
    assert blocks == pytest.approx({"model.layers.0": 0.108, "model.layers.1": 0.892}, abs=1e-4)
    plan = ECoFLaP(sparsity=0.4, max_sparsity=0.9).plan(model, batches_for("llama", model))
    blocks = by_group(plan, structure_of(model), "block")  # extra 1.0, of which the first can take .9
    assert blocks == pytest.approx({"model.layers.0": 0, "model.layers.1": 0.8}, abs=1e-4)


@pytest.mark.parametrize(("value", "word"), [(0.0, "all 2 scores are 0"), (2.5, "all 2 scores are equal")])
def test_scores_that_say_nothing_give_the_uniform_plan_and_a_note(monkeypatch, tmp_path, value, word):
    scored(monkeypatch, {"": value})
    model = MODELS["llama"]()
    data = batches_for("llama", model)
    plan = ECoFLaP(sparsity=0.37, samples=4).plan(model, data)
    assert plan.layers == Uniform(sparsity=0.37).plan(model).layers
    assert len(plan.notes) == 1
    assert word in plan.notes[0]
    assert "uniform" in plan.notes[0]
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").notes == plan.notes


def test_one_tower_that_says_nothing_is_named(monkeypatch):
    scored(monkeypatch, {"vision_tower": 0.0, "layers.0.": 3.0, "layers.1.": 1.0})
    model = MODELS["llava"]()
    plan = ECoFLaP(per_tower=True, samples=4).plan(model, batches_for("llava", model))
    assert plan.notes == ("model.vision_tower: all 2 scores are 0, which says nothing: uniform.",)
    blocks = by_group(plan, structure_of(model), "block")
    assert [round(value, 3) for value in blocks.values()] == [0.5, 0.5, 0.45, 0.55]


@pytest.mark.parametrize("order", ["zeroth", "first"])
@pytest.mark.parametrize("name", ["llava", "blip2", "clip", "t5"])
def test_one_budget_over_all_towers_or_one_each(name, order):
    model, structure = MODELS[name](), structure_of(MODELS[name]())
    data = batches_for(name, model, 1)
    common = ECoFLaP(order=order).plan(model, data)
    scores, sizes = common.scores, {k: sum(one.size for one in v) for k, v in groups_of(structure, "block").items()}
    shares = proportional(scores, sizes, 0.5, high=0.6)
    assert by_group(common, structure, "block") == pytest.approx(shares, abs=2e-3)
    assert max(by_group(common, structure, "block").values()) <= 0.6 + 1e-3
    towers = by_group(common, structure, "tower")
    assert max(abs(value - 0.5) for value in towers.values()) > 0.005  # the towers differ
    each = ECoFLaP(order=order, per_tower=True).plan(model, data)
    assert by_group(each, structure, "tower") == pytest.approx(dict.fromkeys(towers_of(structure), 0.5), abs=1e-3)
    assert common.budget.achieved == each.budget.achieved == 0.5


def test_granularities():
    model, structure = MODELS["llava"](), structure_of(MODELS["llava"]())
    data = batches_for("llava", model, 1)
    layers = ECoFLaP(granularity="layer").plan(model, data)
    assert layers.scores == zeroth_order_gradient(model, data, structure)
    assert len({round(value, 3) for value in sparsities(layers).values()}) > 10
    towers = ECoFLaP(granularity="tower").plan(model, data)
    assert set(towers.scores) == {"model.vision_tower", "model.language_model"}
    for tower, share in by_group(towers, structure, "tower").items():
        inside = [value for name, value in sparsities(towers).items() if name.startswith(tower)]
        assert max(inside) - min(inside) < 2e-3
        assert share == pytest.approx(inside[0], abs=2e-3)


def test_block_scores_are_sums_of_those_of_layers_or_means():
    model, structure = MODELS["t5"](), structure_of(MODELS["t5"]())
    data = batches_for("t5", model)
    for order, score in (("zeroth", zeroth_order_gradient), ("first", first_order_gradient)):
        of_layers = score(model, data, structure)
        for block, layers in groups_of(structure, "block").items():
            total, size = sum(of_layers[layer.name] for layer in layers), sum(layer.size for layer in layers)
            assert ECoFLaP(order=order).plan(model, data).scores[block] == total
            assert ECoFLaP(order=order, average=True).plan(model, data).scores[block] == pytest.approx(total / size)


def test_joint_directions_count_each_block_once():
    model, structure = MODELS["llama"](), structure_of(MODELS["llama"]())
    data = batches_for("llama", model)
    expected = zeroth_order_gradient(model, data, structure, joint=True)
    assert ECoFLaP(joint=True).plan(model, data).scores == expected
    towers = ECoFLaP(joint=True, granularity="tower").plan(model, data)
    assert towers.scores == {"model.layers": sum(expected.values())}


def test_samples_and_step_reach_the_score():
    model = MODELS["llama"]()
    data = batches_for("llama", model, 3)
    first = ECoFLaP(samples=2).plan(model, data)
    assert first.scores == ECoFLaP(samples=1).plan(model, data).scores  # one batch of two
    assert first.scores != ECoFLaP(samples=3).plan(model, data).scores
    assert first.scores != ECoFLaP(samples=2, seed=1).plan(model, data).scores
    assert first.scores != ECoFLaP(samples=2, reference=True).plan(model, data).scores
    assert first.scores == pytest.approx(ECoFLaP(samples=2, tail="exact").plan(model, data).scores, rel=0.1)
    assert first.notes == ()
    assert ECoFLaP(samples=7).plan(model, data).notes == (
        "scores from all 6 samples of the data, fewer than samples=7.",
    )
    assert (ECoFLaP().samples, ECoFLaP(order="first").samples) == (32, 128)


def test_half_precision_is_a_note_of_the_zeroth_order():
    model = MODELS["llama"]().bfloat16()
    data = batches_for("llama", model)
    (note,) = ECoFLaP(samples=4).plan(model, data).notes
    assert note.startswith("zeroth-order scores of bfloat16 weights hold its rounding")
    assert ECoFLaP(samples=4, order="first").plan(model, data).notes == ()


def test_the_cap_is_a_tenth_above_the_target():
    assert ECoFLaP().max_sparsity == 0.6
    assert ECoFLaP(sparsity=0.7).max_sparsity == 0.8
    assert ECoFLaP(sparsity=0.95).max_sparsity == 1
    assert ECoFLaP(max_sparsity=0.8).max_sparsity == 0.8
    model = MODELS["llama"]()
    even = ECoFLaP(sparsity=0.5, max_sparsity=0.5).plan(model, batches_for("llama", model))
    assert max(abs(value - 0.5) for value in sparsities(even).values()) < 1e-3
    with pytest.raises(BudgetError, match=r"Raise max_sparsity to 0\.5"):
        ECoFLaP(max_sparsity=0.4).plan(model, batches_for("llama", model))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"order": "second"}, "order"),
        ({"granularity": "head"}, "granularity"),
        ({"tail": "no"}, "tail"),
        ({"samples": 0}, "samples=0"),
        ({"draws": 0}, "draws=0"),
        ({"step": 0.0}, "step=0"),
        ({"joint": True, "granularity": "layer"}, "joint"),
        ({"joint": True, "order": "first"}, "joint"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(ConfigError, match=word):
        ECoFLaP(**settings)


def test_a_model_of_convolutions_without_blocks_is_asked_for_layers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, pixel_values):
            return self.fc(self.conv2(torch.relu(self.conv1(pixel_values))).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain()
    structure = structure_of(model, include=["*"])
    data = Batches(({"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
                     "labels": torch.tensor([1, 3])},), {})  # fmt: skip
    with pytest.raises(ModelError, match=r"over blocks, and Plain has none .* granularity=layer"):
        ECoFLaP().plan(model, data, structure=structure)
    plan = ECoFLaP(granularity="layer", tail="exact").plan(model, data, structure=structure)
    assert plan.budget.achieved == 0.5
    assert set(plan.scores) == {"conv1", "conv2", "fc"}
    assert ECoFLaP(granularity="layer", order="first").plan(model, data, structure=structure).budget.achieved == 0.5


def test_data_without_labels_and_models_without_a_loss_are_refused_in_one_line():
    vit, flux = MODELS["vit"](), MODELS["flux"]()
    for order in ("zeroth", "first"):
        with pytest.raises(DataError, match="needs labels"):
            ECoFLaP(order=order).plan(vit, Batches((inputs_for("vit", vit),), {}))
        with pytest.raises(ModelError, match="no loss that is known"):
            ECoFLaP(order=order).plan(flux, Batches((inputs_for("flux", flux),), {}))


@pytest.mark.parametrize("name", ["llava", "blip2", "clip"])
def test_end_to_end_on_two_towers(name):
    model, structure = MODELS[name](), structure_of(MODELS[name]())
    data, before = batches_for(name, model), copy.deepcopy(model.state_dict())
    plan = ECoFLaP(samples=2).plan(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result = compress(model, plan, solver=Wanda(), data=data)
    zeros = {layer.name: int((model.get_parameter(layer.parameter) == 0).sum()) for layer in structure}
    assert zeros == plan.zeros(structure.layers)
    total = sum(layer.size for layer in structure)
    assert sum(zeros.values()) == result.zeros == round(0.5 * total)
    for layer in structure:  # rows differ by one weight at most
        rows = (model.get_parameter(layer.parameter) == 0).sum(-1)
        assert int(rows.max() - rows.min()) <= 1
    touched = {layer.parameter for layer in structure}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in touched)
    blocks = by_group(plan, structure, "block")
    sizes = {key: sum(layer.size for layer in layers) for key, layers in groups_of(structure, "block").items()}
    for a in blocks:
        for b in blocks:
            if sizes[a] == sizes[b] and plan.scores[a] > plan.scores[b]:
                assert blocks[a] <= blocks[b] + 2e-3


def test_layers_outside_the_blocks_get_the_target():
    model = MODELS["cifar_resnet"]()
    structure = structure_of(model, include=["*"])
    plan = ECoFLaP(samples=2, order="first").plan(model, batches_for("cifar_resnet", model), structure=structure)
    for name in ("conv1", "fc"):
        assert sparsities(plan)[name] == pytest.approx(0.5, abs=0.01)
    result = compress(model, plan, solver=Magnitude())
    assert result.sparsity == pytest.approx(0.5, abs=1e-4)


def test_exact_counts_take_the_shares_of_many_groups():
    """What the plan does, on groups whose sizes have no common measure."""
    sizes = {"a": 101, "b": 307, "c": 211, "d": 13}
    shares = proportional({"a": 1, "b": 2, "c": 5, "d": 0}, sizes, 0.5, high=0.6)
    zeros = exact_counts(shares, sizes, 0.5, 0.0, 0.6)
    assert sum(zeros.values()) == 316
    assert all(zeros[name] <= 0.6 * sizes[name] + 1 for name in sizes)


def test_scores_of_one_plan_serve_another_sparsity():
    model = small_llama()
    data = Batches(({"input_ids": torch.arange(24).view(2, 12) % 64},), {})
    half, most = (ECoFLaP(sparsity=sparsity, order="first") for sparsity in (0.5, 0.7))
    scores = half.plan(model, data).scores
    assert most.plan(model, data, scores=scores).layers == most.plan(model, data).layers
    with pytest.raises(ConfigError, match=r'none for "model\.layers\.0" '):
        most.plan(model, data, scores={name: score for name, score in scores.items() if name != "model.layers.0"})


def test_what_is_in_no_group_is_not_scored():
    """A pass over the whole model for each: layers outside the blocks have no part in the sums of blocks."""
    model = MODELS["llama"]()
    structure, told = structure_of(model, include=["*"]), []
    assert structure.outside
    data = batches_for("llama", model)
    with watched(lambda done, total, now: told.append(now)):
        ECoFLaP(granularity="block").plan(model, data, structure=structure)
    asked = {line.partition(",")[0] for line in told if line}
    assert asked == {layer.name for block in structure.blocks for layer in block.layers}
