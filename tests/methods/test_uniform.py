import pytest
import torch

from layerwise.errors import ConfigError, ModelError, ShapeError
from layerwise.methods import Uniform
from layerwise.structure import structure_of
from models import MODELS


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("unstructured", 0.5)])
def test_a_pattern_brings_its_sparsity(pattern, sparsity):
    assert Uniform(pattern=pattern).sparsity == sparsity
    assert Uniform(sparsity=sparsity, pattern=pattern) == Uniform(pattern=pattern)


def test_n_of_m_plans_are_exact():
    model = MODELS["llama"]()
    structure = structure_of(model)
    plan = Uniform(pattern="1:4").plan(model)
    assert {(entry.prune.sparsity, entry.prune.pattern) for entry in plan.layers.values()} == {(0.75, "1:4")}
    assert plan.budget.achieved == plan.budget.sparsity == 0.75
    plan.check(structure.layers)


@pytest.mark.parametrize("pattern", ["row", "column", "block(4x4)"])
def test_other_patterns_meet_the_budget_up_to_their_unit(pattern):
    model = MODELS["llama"]()
    structure = structure_of(model)
    plan = Uniform(sparsity=0.3, pattern=pattern).plan(model)
    assert plan.budget.achieved == pytest.approx(0.3, abs=0.02)
    plan.check(structure.layers)


class Odd(torch.nn.Module):
    def __init__(self, inner=6):
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, inner), torch.nn.Linear(inner, 8), torch.nn.LayerNorm(8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)))


def test_layers_that_the_pattern_does_not_divide_are_named_or_left_dense():
    model = torch.nn.Sequential(Odd(), Odd(), Odd(), Odd(), Odd())
    with pytest.raises(ShapeError) as caught:
        Uniform(pattern="2:4").plan(model)
    assert str(caught.value) == (
        'pattern 2:4 does not divide 5 of 10 layers (outputs x inputs): "0.down" (8 x 6), "1.down" (8 x 6), "2.down" (8 x 6),'
        ' "3.down" (8 x 6) and 1 more. Exclude them (--exclude), or leave them dense: indivisible="dense" (--set indivisible=dense).'
    )
    plan = Uniform(pattern="2:4", indivisible="dense").plan(model)
    assert list(plan.layers) == ["0.up", "1.up", "2.up", "3.up", "4.up"]
    assert plan.budget.achieved == 0.5
    plan.check(structure_of(model).layers)
    assert Uniform(pattern="2:4").plan(model, structure=structure_of(model, exclude=["*.down"])).layers == plan.layers


def test_a_pattern_that_divides_nothing_is_an_error_either_way():
    model = torch.nn.Sequential(Odd(), Odd())
    with pytest.raises(ShapeError, match=r"pattern 5:16 divides none of the 4 layers"):
        Uniform(pattern="5:16", indivisible="dense").plan(model)
    with pytest.raises(ModelError, match="no layer is up for compression"):
        Uniform().plan(torch.nn.ReLU())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 means sparsity 0.5, not 0.6"),
        ({"pattern": "4:2"}, "unknown pattern. write unstructured, row, column, n:m"),
        ({"pattern": "0:0"}, "unknown pattern"),
        ({"pattern": "0:4"}, "unknown pattern"),
        ({"pattern": "blocky"}, "unknown pattern"),
        ({"sparsity": 1.2}, "Uniform.sparsity=1.2: give the fraction removed, 0 <= sparsity < 1."),
    ],
)
def test_bad_patterns_get_one_clear_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        Uniform(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_whole_blocks_make_of_the_budget_is_said():
    model = MODELS["llama"]()
    assert not Uniform(pattern="block(4x4)", sparsity=0.5).plan(model).notes
    plan = Uniform(pattern="block(16x16)", sparsity=0.3).plan(model)
    (note,) = plan.notes
    assert f"{plan.budget.achieved:.2%} of the 30.00% asked for" in note
    assert plan.budget.achieved != pytest.approx(0.3, abs=0.005)
