"""One width for all blocks: never more parameters, the budget used as far as steps allow, and a stock folder in the end."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import BudgetError, ConfigError, PlanError
from layerwise.io import save
from layerwise.plan import Plan, Resize
from layerwise.shrink import apply, uniform_widths
from layerwise.structure import coupled_groups
from layerwise.treatments import kept_text
from models import DECODER, MODELS, small_llama


def four(**more):
    return small_llama(**{**DECODER, "num_hidden_layers": 4, **more})


def channels(plan):
    return {name: entry.resize.channels for name, entry in plan.layers.items() if entry.resize}


def test_worked_by_hand():
    # 96 numbers a channel (three rows or columns of 32): 40 + 24 + 64 + 50 = 178 of 256, 44.5 each, 40 in steps of 8
    model = four()
    counts = {"model.layers.0.mlp": 40, "model.layers.1.mlp": 24, "model.layers.3.mlp": 50}
    plan = uniform_widths(model, counts, multiple_of=8)
    assert channels(plan) == {f"model.layers.{index}.mlp": 40 for index in range(4)}
    # 24 + 10 go, 16 come back: 18 x 96 fewer
    assert plan.notes == (
        "One width for all blocks (2 of 2 key/value heads, 40 of 64 channels): 1,728 parameters fewer than with widths of each block;"
        " 34 units that were kept go, 16 that were removed stay.",
    )


def test_what_heads_leave_goes_to_channels():
    # one key head of one block goes: 1.75 each is 1, three heads of (2 x 8 + 2 x 8) x 32 + 16 x 32 less than planned ...
    model = four()
    groups = {group.name: group for group in coupled_groups(model).groups}
    head = (16 + 8 + 8 + 16) * 32  # rows of q, k and v, columns of o
    plan = uniform_widths(
        model, {"model.layers.0.self_attn": 1} | {f"model.layers.{i}.mlp": 32 for i in range(4)}, multiple_of=4
    )
    entries = {name: entry.resize for name, entry in plan.layers.items()}
    assert [entries[f"model.layers.{i}.self_attn"].kv_heads for i in range(4)] == [1] * 4
    assert entries["model.layers.1.self_attn"].heads == groups["model.layers.1.self_attn"].queries
    # ... which are 3 x 1536 / (4 x 96) = 12 channels more in each
    assert 3 * head // (4 * 96) == 12
    assert entries["model.layers.2.mlp"].channels == 44
    assert ": 0 parameters fewer" in plan.notes[-1]


@pytest.mark.parametrize("compensate", [False, True])
def test_biases_that_come_count(compensate):
    """A head frees (32 + 8 + 8 + 32) x 32 numbers and 48 biases, less for its size than the channels that it pays for, 96 and 2: three
    of them are 20 channels in each of four blocks, with biases 19."""
    model = four(num_attention_heads=8, head_dim=8)
    entries = {"model.layers.0.self_attn": Resize(heads=4, kv_heads=1)}
    plan = Plan.model_validate(
        {
            "method": {"name": "flap", "compensate": compensate},
            "layers": {**entries, **{f"model.layers.{index}.mlp": Resize(channels=32) for index in range(4)}},
        }
    )
    got = uniform_widths(model, plan, multiple_of=1)
    assert {*channels(got).values()} - {None} == {51 if compensate else 52}
    data = [{"input_ids": torch.arange(8)[None]}]
    before, after = (apply(copy.deepcopy(model), one, data).after for one in (plan, got))
    fewer = 3 * (2560 + 48) - 4 * 19 * 98 if compensate else 0
    assert before - after == fewer
    assert f": {fewer:,} parameters fewer" in got.notes[-1]


def test_biases_that_no_longer_come_are_said():
    """One channel goes, and comes back with what three heads leave: of no MLP a channel is cut, and none gets biases."""
    model, data = four(num_attention_heads=8, head_dim=8), [{"input_ids": torch.arange(8)[None]}]
    plan = Plan.model_validate(
        {
            "method": {"name": "flap", "compensate": True},
            "layers": {
                "model.layers.0.self_attn": Resize(heads=4, kv_heads=1),
                "model.layers.0.mlp": Resize(channels=63),
            },
        }
    )
    got = uniform_widths(model, plan, multiple_of=1)
    assert {*channels(got).values()} == {None}
    before, after = (apply(copy.deepcopy(model), one, data).after for one in (plan, got))
    assert f": {before - after:,} parameters fewer" in got.notes[-1]


def test_units_that_the_plan_keeps_stay_first():
    model = four()
    kept = [*range(40, 64)]
    which = kept_text(unit in kept for unit in range(64))
    first = Resize(channels=24, kept=which)
    plan = Plan(
        layers={"model.layers.0.mlp": first, "model.layers.1.mlp": Resize(channels=8, kept=kept_text(unit < 8 for unit in range(64)))}
        | {f"model.layers.{index}.mlp": Resize(channels=16) for index in (2, 3)}
    )  # fmt: skip
    got = uniform_widths(model, plan, multiple_of=16)
    assert {*got.layers["model.layers.0.mlp"].resize.chosen(64)} < {*kept}
    with torch.no_grad():
        size = sum(
            weight.square().sum(dim)
            for weight, dim in zip(
                (model.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.up_proj.weight,
                 model.model.layers[0].mlp.down_proj.weight), (1, 1, 0))
        )  # fmt: skip
    assert got.layers["model.layers.0.mlp"].resize.chosen(64) == sorted(sorted(kept, key=lambda unit: -size[unit])[:16])
    assert {*range(8)} < {*got.layers["model.layers.1.mlp"].resize.chosen(64)}


def test_the_result_is_a_stock_folder(tmp_path):
    model = four()
    plan = uniform_widths(model, {f"model.layers.{i}.mlp": 20 + 10 * i for i in range(4)}, multiple_of=16)
    apply(model, plan)
    saved = save(model, tmp_path / "out", plan=plan)
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert model.config.intermediate_size == 32


def test_what_fused_experts_cannot_have_is_rounded():
    model = MODELS["qwen3_moe"]()
    groups = [group for group in coupled_groups(model).groups if group.kind == "channels"]
    plan = uniform_widths(model, dict.fromkeys((group.name for group in groups), 12), multiple_of=1)
    assert {*channels(plan).values()} == {8}
    apply(model, plan)
    assert model.config.moe_intermediate_size == 8


def test_blocks_that_are_dropped_do_not_count():
    model = four()
    layers = {"model.layers.0.mlp": Resize(channels=16), "model.layers.1.mlp": Resize(channels=32)}
    plan = Plan.model_validate(
        {"layers": {**layers, "model.layers.2": {"drop": True}, "model.layers.3": {"drop": True}}}
    )
    got = uniform_widths(model, plan, multiple_of=8)
    assert channels(got) == {"model.layers.0.mlp": 24, "model.layers.1.mlp": 24}
    apply(model, got)
    assert len(model.model.layers) == 2
    assert model.config.intermediate_size == 24


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_never_more_parameters_and_less_than_a_step_fewer(data):
    model = MODELS["llama"]()
    groups = coupled_groups(model).groups
    counts = {group.name: data.draw(st.integers(1, group.units)) for group in groups}
    step = data.draw(st.sampled_from([1, 4, 16]))
    total = sum(parameter.numel() for parameter in model.parameters())
    head, channel = (16 + 8 + 8 + 16) * 32, 96
    planned = total - sum(
        (group.units - counts[group.name]) * (head if group.kind == "heads" else channel) for group in groups
    )
    try:
        plan = uniform_widths(model, counts, multiple_of=step)
    except BudgetError:
        assert sum(counts[group.name] for group in groups if group.kind == "channels") < 2 * step
        return
    after = apply(model, plan).after
    assert after <= planned
    sizes = {(layer.mlp.up_proj.out_features, layer.self_attn.k_proj.out_features) for layer in model.model.layers}
    assert len(sizes) == 1
    width = sizes.pop()[0]
    assert width == 64 or (width % step == 0 and planned - after < 2 * step * channel)


def test_bad_requests():
    model = four()
    with pytest.raises(BudgetError, match=r"keep 40 of 64 channels each, fewer than 64. Give multiple_of=40 or less"):
        uniform_widths(model, {f"model.layers.{index}.mlp": 40 for index in range(4)})
    with pytest.raises(ConfigError, match="multiple_of=0"):
        uniform_widths(model, {}, multiple_of=0)
    with pytest.raises(PlanError, match=r"model.layers.9.mlp"):
        uniform_widths(model, {"model.layers.9.mlp": 3})
    with pytest.raises(PlanError, match="1 to 64 can be kept, not 80"):
        uniform_widths(model, {"model.layers.0.mlp": 80})
