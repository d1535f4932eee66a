import pytest
import torch

from layerwise.errors import BudgetError, ConfigError, ModelError
from layerwise.methods import OWL
from layerwise.scores import outlier_ratio
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


class Residual(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.up, self.down = torch.nn.Linear(16, inner), torch.nn.Linear(inner, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def unequal():
    """Three blocks of 1024, 2048 and 4096 weights; the second has a few large ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(Residual(inner) for inner in (32, 64, 128)))
        data = Batches(tuple({"input": torch.randn(2, 5, 16)} for _ in range(2)), {})
    with torch.no_grad():
        model[1].up.weight[:3] *= 30
    return model, data


def block_sparsities(plan, model):
    sparsities = {}
    for block in structure_of(model).blocks:
        zeros = sum(plan.zeros(block.layers).values())
        sparsities[block.name] = zeros / sum(layer.size for layer in block.layers)
        for layer in block.layers:  # all layers of a block share its sparsity, up to a weight
            assert plan.layers[layer.name].prune.sparsity == pytest.approx(sparsities[block.name], abs=2 / layer.size)
    return sparsities


def test_blocks_with_more_outliers_keep_more():
    model, data = unequal()
    plan = OWL(sparsity=0.7).plan(model, data)
    ratios = outlier_ratio(model, data, structure_of(model), 5.0)
    assert dict(plan.scores) == ratios
    assert ratios["1"] == max(ratios.values()) > min(ratios.values())
    got = block_sparsities(plan, model)
    assert sorted(got, key=got.get) == sorted(ratios, key=ratios.get, reverse=True)
    assert max(got.values()) - min(got.values()) == pytest.approx(0.16, abs=2e-3)
    # the formula, by hand: extra = (D - min) / (max - min) * 2 * lambda, centred by weight
    low, high = min(ratios.values()), max(ratios.values())
    extra = {name: (ratio - low) / (high - low) * 0.16 for name, ratio in ratios.items()}
    mean = (extra["0"] * 1024 + extra["1"] * 2048 + extra["2"] * 4096) / 7168
    assert got == pytest.approx({name: 0.7 - extra[name] + mean for name in extra}, abs=2e-3)
    assert sum(plan.zeros(structure_of(model).layers).values()) == round(0.7 * 7168)


def test_blocks_that_are_alike_share_one_sparsity():
    model, data = unequal()
    with torch.no_grad():  # no score is above ten thousand times its mean: every ratio is 0
        plan = OWL(sparsity=0.7, outlier_factor=1e4).plan(model, data)
    assert set(plan.scores.values()) == {0.0}
    assert list(block_sparsities(plan, model).values()) == pytest.approx([0.7] * 3, abs=1e-3)


def test_no_block_goes_beyond_the_bounds_however_wide_the_spread():
    model, data = unequal()
    got = block_sparsities(OWL(sparsity=0.9, spread=0.5).plan(model, data), model)
    assert all(0 <= value <= 1 for value in got.values())
    capped = block_sparsities(OWL(sparsity=0.7, max_sparsity=0.72).plan(model, data), model)
    assert max(capped.values()) <= 0.72
    assert min(capped.values()) < 0.68


def test_layers_outside_blocks_get_the_target():
    model = MODELS["cifar_resnet"]()
    data = Batches((inputs_for("cifar_resnet", model),), {})
    structure = structure_of(model, include=["*"])
    plan = OWL(sparsity=0.6, outlier_factor=2.0).plan(model, data, structure=structure)
    for name in ("conv1", "fc"):
        size = structure.layer(name).size
        assert plan.layers[name].prune.sparsity == pytest.approx(0.6, abs=1 / size)
    assert sum(plan.zeros(structure.layers).values()) == round(0.6 * sum(layer.size for layer in structure))


def test_a_model_without_blocks_is_refused_with_what_to_use_instead():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    data = Batches(({"input": torch.ones(1, 4)},), {})
    with pytest.raises(ModelError, match=r"Sequential has none with layers up for compression\. Use erk or uniform"):
        OWL().plan(model, data, structure=structure_of(model, include=["*"]))


def test_an_infeasible_budget_is_found_before_any_forward_pass():
    model, _ = unequal()
    data = Batches(({"input": torch.ones(1, 7)},), {})  # would fail
    with pytest.raises(
        BudgetError, match=r"^50 % can go \(max_sparsity=0.5\), target 70 %. Raise max_sparsity to 0.7.$"
    ):
        OWL(max_sparsity=0.5).plan(model, data)


@pytest.mark.parametrize(
    "settings", [{"spread": 0.6}, {"spread": -0.1}, {"outlier_factor": 1.0}, {"max_sparsity": 1.1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        OWL(**settings)
