"""The plan of ARMOR: sides of blocks by hand, what they cost, the budget met, and layers that no block divides."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from factors import drawn
from layerwise.engine import compress
from layerwise.errors import BudgetError, ConfigError, ModelError, ShapeError
from layerwise.io.armor_linear import factored
from layerwise.methods import METHODS, Armor, method_from
from layerwise.methods.armor import sides_of
from layerwise.plan import Factorize, Plan, Treatments
from layerwise.solvers import ARMOR
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def sides(model, **settings):
    plan = Armor(**settings).plan(model, structure=structure_of(model, include=["*"]))
    return {name: one.factorize.block for name, one in plan.layers.items()}


class Block(nn.Module):
    """Qwen2.5-7B's shapes over 28: a square layer, a skinny one, a wide one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.gate = nn.Linear(128, 128), nn.Linear(128, 32), nn.Linear(128, 640)


def test_sides_by_hand():
    """Overheads of b: q 2b/128, k b * 160 / 4096, gate b * 768 / 81920."""
    model = nn.ModuleList([Block()])
    assert sides(model, overhead=0.1) == {"0.q": 4, "0.k": 4, "0.gate": 8}
    assert sides(model, overhead=0.5) == {"0.q": 32, "0.k": 8, "0.gate": 32}
    assert sides(model, overhead=9.0) == {"0.q": 128, "0.k": 32, "0.gate": 128}
    assert sides(model, overhead=9.0, block=40) == {"0.q": 32, "0.k": 32, "0.gate": 32}
    assert sides(model, overhead=1e-9) == {"0.q": 4, "0.k": 4, "0.gate": 4}  # the smallest that there is
    assert sides(model, overhead=1e-9, pattern="4:8") == {"0.q": 8, "0.k": 8, "0.gate": 8}


@given(bits=st.floats(9.4, 40))
def test_a_budget_of_bits_is_met_and_no_step_more_would_fit(bits):
    model = nn.ModuleList([Block()])
    structure = structure_of(model, include=["*"])
    try:
        plan = Armor(bits=bits).plan(model, structure=structure)
    except BudgetError:
        least = Armor(overhead=1e-9).plan(model, structure=structure)
        assert least.achieved_bits(structure.layers) > bits
        return
    got = plan.achieved_bits(structure.layers)
    assert got <= bits
    assert plan.budget.bits == bits
    assert plan.budget.achieved_bits == pytest.approx(got)
    plan.check(structure.layers)
    for layer in structure.layers:  # no layer has room for the next side
        own = plan.layers[layer.name].factorize.block
        larger = [side for side in sides_of(layer, 128, "2:4") if side > own]
        if larger:
            next_one = plan.model_copy(
                update={"layers": {**plan.layers, layer.name: Treatments(factorize=Factorize(block=larger[0]))}}
            )
            assert next_one.achieved_bits(structure.layers) > bits


def test_too_few_bits_say_what_is_needed():
    with pytest.raises(
        BudgetError, match=r"Armor\.bits=9: cores of 2:4 with the smallest blocks take 9\.7400 bits per weight"
    ):
        Armor(bits=9.0).plan(nn.ModuleList([Block()]), structure=structure_of(nn.ModuleList([Block()]), include=["*"]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "phi3"])
def test_the_plan_is_carried_out_on_models_and_survives_yaml(name, tmp_path):
    model = MODELS[name]().eval()
    structure = structure_of(model)
    plan = Armor(overhead=0.3).plan(model)
    assert {one.name for one in structure} == set(plan.layers)
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again == plan
    again.check(structure.layers, fingerprint=structure.fingerprint)
    data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})
    result = compress(model, again, solver=ARMOR(iterations=1, storage="bfloat16"), data=data)
    assert result.bits == pytest.approx(plan.budget.achieved_bits)


def test_layers_that_no_block_divides_are_named_or_left_dense():
    model = MODELS["mixtral"]()
    with pytest.raises(ShapeError, match=r'or they are no linears of their own: .*experts.* indivisible="dense"'):
        Armor().plan(model)
    plan = Armor(indivisible="dense").plan(model)
    assert plan.layers
    assert not any("experts" in name for name in plan.layers)
    odd = nn.ModuleList([nn.Linear(6, 10)])
    with pytest.raises(ShapeError, match=r'"0" \(10 x 6\)'):
        Armor(indivisible="dense").plan(odd, structure=structure_of(odd, include=["*"]))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"pattern": "unstructured"}, "pattern"),
        ({"pattern": "5:4"}, "pattern"),
        ({"pattern": "row"}, "pattern"),
        ({"block": 2}, "give at least 4, a whole group of 2:4"),
        ({"overhead": 0.0}, "overhead"),
        ({"bits": -1.0}, "bits"),
        ({"indivisible": "skip"}, "indivisible"),
    ],
)
def test_bad_settings_are_one_line(settings, word):
    with pytest.raises(ConfigError, match=word) as caught:
        Armor(**settings)
    assert "\n" not in str(caught.value)


def test_it_is_a_method_like_the_others():
    assert METHODS["armor"] is Armor
    built = method_from("armor", block=32, pattern="1:4")
    assert dataclasses.asdict(built)["block"] == 32
    assert not built.needs_data
    model = MODELS["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (built.plan(model) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_treatments_that_cannot_be_are_refused():
    for bad in ({"block": 6}, {"block": 4, "pattern": "unstructured"}, {"block": 4, "pattern": "4:8"}, {"block": 0}):
        with pytest.raises(ValueError, match=r"multiple of|n:m|at least 1|greater than"):
            Factorize(**bad)
    assert Factorize(block=8, pattern="4:8").problem(16, 24) is None
    assert "diagonal blocks of 8" in Factorize(block=8).problem(16, 12)


def test_a_model_in_factors_is_told_from_one_without_blocks():
    model = MODELS["llama"]()
    factored(model, {layer.name: drawn(layer.rows, layer.columns, 4) for layer in structure_of(model)})
    with pytest.raises(ModelError, match="its layers are in factors"):
        Armor().plan(model)
