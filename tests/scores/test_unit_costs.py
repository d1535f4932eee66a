"""What units cost: exact in parameters, bytes and multiply-adds; in time, a table that adds up."""

import pytest
import torch

from layerwise.errors import BudgetError, ConfigError, ScoreError
from layerwise.methods import method_from
from layerwise.scores.unit_costs import KINDS, costs_of, forward_time
from layerwise.shrink import apply, shrink
from layerwise.structure import coupled_groups
from models import MODELS, small_llama
from shrinking import drawn


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", ["parameters", "bytes", "macs"])
def test_what_is_cut_is_what_it_cost(name, kind):
    model = MODELS[name]().bfloat16()
    groups = coupled_groups(model).groups
    before = costs_of(model, groups, kind)
    keep = drawn(coupled_groups(model), 1)
    shrink(model, keep)
    after = costs_of(model, coupled_groups(model).groups, kind)
    gone = sum(before.units[group.name] * (group.units - len(keep[group.name])) for group in groups)
    assert before.total - after.total == gone
    assert after.units == before.units


def test_multiply_adds_worked_by_hand():
    """Two blocks of q, k, v, o and gate, up, down, and the head, which is tied to the embedding in one of them."""
    own = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 50,
    }
    blocks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    for tied in (False, True):
        model = small_llama(**own, tie_word_embeddings=tied)
        assert costs_of(model, coupled_groups(model).groups, "macs").total == blocks + 50 * 32


def test_a_token_multiplies_with_the_experts_that_it_goes_to():
    """2 of 4, in each of two blocks, beside attention and router."""
    model = MODELS["mixtral"]()
    each = 2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + 2 * 3 * 64 * 32
    groups = coupled_groups(model).groups
    found = costs_of(model, groups, "macs")
    assert found.total == 2 * each + 96 * 32
    assert {found.units[group.name] for group in groups if group.kind == "channels"} == {2 * 3 * 32}
    model.config = None
    with pytest.raises(ScoreError, match="how many experts"):
        costs_of(model, groups, "macs")


def test_time_is_a_table_of_distinct_shapes():
    model = small_llama(hidden_size=64, intermediate_size=512, num_hidden_layers=3)
    groups = coupled_groups(model).groups
    found = costs_of(model, groups, "latency", rows=64)
    assert found.total > 0
    assert found.unit == "ms"
    by_kind = {kind: {found.units[g.name] for g in groups if g.kind == kind} for kind in ("heads", "channels")}
    assert all(len(values) == 1 for values in by_kind.values())  # the same shapes are measured once
    assert forward_time(model, 4) > 0
    with pytest.raises(ScoreError, match="does not run on"):
        forward_time(MODELS["vit"](), 1)
    with pytest.raises(ScoreError, match="fused experts"):
        costs_of(MODELS["mixtral"](), coupled_groups(MODELS["mixtral"]()).groups, "latency")


@pytest.mark.parametrize("kind", ["bytes", "macs"])
def test_methods_meet_other_budgets(kind):
    model = MODELS["llama"]()
    total = costs_of(model, coupled_groups(model).groups, kind).total
    plan = method_from("magnitude-width", parameters=0.7, budget=kind).plan(model)
    apply(model, plan)
    left = costs_of(model, coupled_groups(model).groups, kind).total
    assert 0.68 * total < left <= 0.7 * total
    said = plan.budget.bytes if kind == "bytes" else plan.budget.flops / 2
    assert said == int(0.7 * total + 1e-6)


def test_bad_budgets():
    model = MODELS["llama"]()
    with pytest.raises(ConfigError, match="parameters, bytes, macs or latency"):
        method_from("magnitude-width", budget="euros").plan(model)
    with pytest.raises(ConfigError, match="rows=0"):
        costs_of(model, (), "latency", rows=0)
    with pytest.raises(BudgetError, match=r"\d\.\d{3} ms cannot be kept"):
        method_from("magnitude-width", parameters=1e-6, budget="latency").plan(model)
    assert "latency" in KINDS
    assert torch.is_grad_enabled()
