"""Methods that cut heads, channels and blocks: budgets met, plans that apply, the shared rules of every method."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.allocate.units import Sized, lowest_first, meet, parameters_of
from layerwise.errors import BudgetError, ConfigError, DataError, ModelError, PlanError
from layerwise.methods import METHODS, method_from
from layerwise.methods.widths import Widths
from layerwise.plan import Plan
from layerwise.shrink import apply, kept_by, uniform_widths
from layerwise.structure import coupled_groups, numbers_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama

WIDTHS = ("magnitude-width", "random-width", "llm-pruner", "flap", "adapt-pruner")
NAMES = ("llama", "qwen2", "gpt2", "phi3", "opt", "gemma3")
BAD = {
    "magnitude-width": ({"min_channels": 0}, "at least 1"),
    "random-width": ({"parameters": 0}, "parameters=0"),
    "llm-pruner": ({"form": "third"}, "form"),
    "flap": ({"score": "wfv"}, "score"),
    "shortgpt": ({"blocks": -1}, "blocks=-1"),
    "adapt-pruner": ({"scale": "log"}, "scale"),
}


def data_for(name, model):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})


def made(name, parameters, **more):
    own = {"step": 0.1, "amplitude": 0.05} if name == "adapt-pruner" else {}
    own |= {"first_whole": 0.0, "last_whole": 0.0} if name == "llm-pruner" else {}
    return method_from(name, parameters=parameters, **own, **more)


@pytest.mark.parametrize("model_name", NAMES)
@pytest.mark.parametrize("name", WIDTHS)
def test_the_budget_is_met_to_less_than_a_unit_and_the_plan_applies(name, model_name):
    model = MODELS[model_name]()
    before = copy.deepcopy(model.state_dict())
    data = data_for(model_name, model)
    total = sum(one.numel() for one in model.parameters())
    plan = made(name, 0.75).plan(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plan == made(name, 0.75).plan(model, data)
    assert Plan.from_text(plan.to_yaml()) == plan
    target = int(total * 0.75)
    assert plan.budget.parameters == target
    assert plan.model.fingerprint == structure_of(model).fingerprint
    left = apply(model, plan, data).after
    assert left == sum(one.numel() for one in model.parameters())
    # Adapt-Pruner's last step may have taken heads alone, and what earlier steps took does not come back
    costs = [numbers_of(model, group) for group in coupled_groups(model).groups]  # with the biases that FLAP gives
    assert left <= target < left + (max(costs) if name == "adapt-pruner" else min(costs))
    assert plan.notes[0].startswith(f"{left:,} of {total:,} parameters stay")
    with torch.no_grad():
        assert all(one.isfinite().all() for one in model(**data[0]).logits)


@pytest.mark.parametrize("name", [*WIDTHS, "shortgpt"])
def test_shared_rules(name):
    assert METHODS[name].name == name
    wrong, word = BAD[name]
    with pytest.raises(ConfigError, match=word):
        method_from(name, **wrong).plan(small_llama(), data_for("llama", MODELS["llama"]()))
    if METHODS[name].needs_data:
        with pytest.raises(DataError, match="needs calibration data"):
            made(name, 0.9).plan(MODELS["llama"]())
    method = made(name, 0.9)
    assert method_from(**{"name": name, **dataclasses.asdict(method)}) == method


@pytest.mark.parametrize("name", WIDTHS)
def test_what_cannot_be_reached_says_what_can(name):
    model = MODELS["llama"]()
    with pytest.raises(BudgetError, match="is the least"):
        made(name, 0.05).plan(model, data_for("llama", model))
    with pytest.raises(BudgetError, match="cannot be kept"):
        made(name, 10**9).plan(model, data_for("llama", model))
    with pytest.raises(ModelError, match="no heads or channels"):
        made(name, 0.9).plan(MODELS["cifar_resnet"](), data_for("cifar_resnet", model))


@pytest.mark.parametrize("name", ["magnitude-width", "adapt-pruner"])
def test_floors_and_multiples(name):
    model = MODELS["llama"]()
    plan = made(name, 0.7, min_channels=24, multiple_of=8).plan(model, data_for("llama", model))
    kept = [entry.resize.channels for entry in plan.layers.values() if entry.resize.channels is not None]
    assert kept
    assert all(one >= 24 and one % 8 == 0 for one in kept)


def test_multiples_hold_together_with_those_of_fused_experts():
    model = MODELS["mixtral"]()
    data = data_for("mixtral", model)
    plan = made("magnitude-width", 0.6, multiple_of=12).plan(model, data)
    kept = [entry.resize.channels for entry in plan.layers.values() if entry.resize.channels is not None]
    assert kept
    assert all(one % 24 == 0 for one in kept)
    apply(model, plan)


@pytest.mark.parametrize("name", WIDTHS)
def test_excluded_layers_leave_their_group_whole(name):
    model = MODELS["llama"]()
    structure = structure_of(model, exclude=["model.layers.0.mlp.up_proj"])
    plan = made(name, 0.85).plan(model, data_for("llama", model), structure=structure)
    assert plan.layers
    assert "model.layers.0.mlp" not in plan.layers


def test_blocks_that_cannot_give_so_much_are_said_in_the_budget_s_own_unit():
    model = MODELS["llama"]()
    method = method_from("llm-pruner", parameters=0.5, budget="macs", first_whole=0.5)
    with pytest.raises(BudgetError, match="multiply-adds"):
        method.plan(model, data_for("llama", model))


def test_llm_pruner_s_counts_on_its_own_models():
    """Check 1: 0.25 of the groups in blocks 4 to 29 of LLaMA-7B: 8 heads and 2752 channels each; TinyLlama 4 to 17: 1 and 1408."""
    for config, blocks, heads, channels, before, after in (
        (LlamaConfig(), range(4, 30), 8, 2752, 6_738_415_616, 5_422_977_024),
        (
            LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4),
            range(4, 18), 1, 1408, 1_100_048_384, 945_907_712,
        ),
        (
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256,
                tie_word_embeddings=False,
            ),
            range(4, 30), 2, 3584, 8_030_261_248, 6_612_586_496,
        ),
    ):  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        widths = Widths("test", model, None, 0.9)
        assert widths.total == before
        names = {f"model.layers.{index}" for index in blocks}
        kept = {
            group.name: group.units - ((heads if group.kind == "heads" else channels) if group.block in names else 0)
            for group in widths.groups
        }
        assert parameters_of(widths.total, widths.sized, kept) == after


def test_shortgpt_drops_what_changes_least():
    short = MODELS["llama"]()
    model = type(short)(LlamaConfig.from_dict({**short.config.to_dict(), "num_hidden_layers": 5}))
    data = data_for("llama", model)
    plan = method_from("shortgpt", blocks=2).plan(model, data)
    gone = [name for name, entry in plan.layers.items() if entry.drop]
    lowest = sorted(plan.scores, key=plan.scores.__getitem__)[:2]
    assert {*gone} == {*lowest}
    apply(model, plan)
    assert model.config.num_hidden_layers == 3
    with pytest.raises(PlanError, match="this model has other parameters"):
        apply(model, plan)  # blocks count anew: others would go
    assert model.config.num_hidden_layers == 3
    with pytest.raises(BudgetError, match="without the 1 of 2 blocks that can go"):
        method_from("shortgpt", parameters=0.01).plan(MODELS["llama"](), data_for("llama", MODELS["llama"]()))


def test_shortgpt_keeps_blocks_that_others_need(monkeypatch):
    """T5's first blocks hold the position biases of all: they stay whatever their influence, and so does the last block of a stack."""
    model = MODELS["t5"]()
    data = data_for("t5", model)
    names = [block.name for block in structure_of(model).blocks]
    monkeypatch.setattr(
        "layerwise.methods.shortgpt.block_influence", lambda *_: dict(zip(names, range(4), strict=True))
    )
    plan = method_from("shortgpt", blocks=2).plan(model, data)
    assert [name for name, entry in plan.layers.items() if entry.drop] == ["encoder.block.1", "decoder.block.1"]
    assert plan.notes[1] == "kept, since the model cannot be built without: encoder.block.0, decoder.block.0."
    apply(model, plan)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (1, 1)
    with torch.no_grad():
        model(**data[0])
    with pytest.raises(BudgetError, match="without the 2 of 4 blocks that can go"):
        method_from("shortgpt", blocks=3).plan(MODELS["t5"](), data)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_meet_never_exceeds_and_leaves_no_room_for_a_unit(groups, share):
    sized = {i: Sized(units, cost, 1, multiple) for i, (units, cost, multiple) in enumerate(groups)}
    total = 7 + sum(one.units * one.cost for one in sized.values())
    least = parameters_of(total, sized, {name: one.allowed(0) for name, one in sized.items()})
    target = least + int(share * (total - least))
    found = meet(total, sized, target, lambda t: {name: one.units * (1 - t) for name, one in sized.items()})
    left = parameters_of(total, sized, found)
    assert left <= target
    for name, one in sized.items():
        assert one.allowed(found[name]) == found[name]
        if found[name] + one.multiple <= one.units:
            assert left + one.cost * one.multiple > target


def test_of_equal_scores_the_lower_index_goes_first():
    """As a stable argsort takes them (Adapt-Pruner, D5), in every step from scores to units."""
    assert lowest_first([1.0, 2.0, 1.0, 1.0], 2) == [1, 3]
    assert lowest_first([1.0, 2.0, 1.0, 1.0], 0) == []
    model = MODELS["llama"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    told = {f"model.layers.{index}.mlp": {"resize": {"channels": 40}} for index in range(2)}
    without = Plan.model_validate({"layers": told})  # of which those of the largest weights stay
    plans = (made("magnitude-width", 0.8).plan(model), uniform_widths(model, without, multiple_of=1))
    kept = [one.resize.chosen(64) for plan in plans for one in plan.layers.values() if one.resize.channels]
    kept.append(kept_by(model, without, coupled_groups(model))["model.layers.0.mlp"])
    assert all(units and units == [*range(64 - len(units), 64)] for units in kept)
