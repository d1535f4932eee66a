"""Adapt-Pruner's steps: where they end, what they look at, and what the code's own do."""

import dataclasses
from functools import partial

import pytest
import torch

from layerwise.errors import ConfigError
from layerwise.methods import AdaptPruner, adapt_pruner
from layerwise.shrink import apply
from layerwise.structure import coupled_groups, numbers_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def data_for(model):
    return Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})


@pytest.mark.parametrize("reference", [False, True])
def test_adapt_pruner_ends_where_its_most_important_block_would_never_move(monkeypatch, reference):
    """Amplitude = step, as in the scripts: of two blocks the important one gains 0.1 - 0.1 * 1 a step."""
    taken, step = [], AdaptPruner._step

    def counted(*given):
        taken.append(1)
        assert len(taken) < 100
        return step(*given)

    monkeypatch.setattr(AdaptPruner, "_step", counted)
    model = MODELS["llama"]()
    total = sum(one.numel() for one in model.parameters())
    for amplitude in (0.1, 0.15):
        method = AdaptPruner(parameters=0.45, step=0.1, amplitude=amplitude, reference=reference)
        plan = method.plan(model, data_for(model))
        assert apply(MODELS["llama"](), plan).after <= 0.45 * total


def test_adapt_pruner_s_steps_look_at_the_next_batches(monkeypatch):
    """Two of five a step, for influence and gradients alike; after the last comes the first; a schedule that goes on goes on here, too."""
    model, seen = MODELS["llama"](), {"block_influence": [], "unit_taylor": []}
    data = Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(5)), {"source": "drawn"})
    numbers = {id(batch): number for number, batch in enumerate(data)}
    for name, noted in seen.items():

        def told(own, noted, first, batches, *more, **named):
            noted.append([numbers[id(batch)] for batch in batches])
            return own(first, batches, *more, **named)

        monkeypatch.setattr(adapt_pruner, name, partial(told, getattr(adapt_pruner, name), noted))
    method, schedule = AdaptPruner(parameters=0.7, step=0.1, amplitude=0.05, batches=2), adapt_pruner.Schedule.of(model)
    plan = method.plan(model, data, schedule=schedule)
    assert seen["unit_taylor"] == seen["block_influence"]
    assert seen["unit_taylor"][:4] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert plan == method.plan(model, data)
    steps = len(seen["unit_taylor"]) // 2
    apply(model, plan)
    dataclasses.replace(method, parameters=0.9).plan(model, data, schedule=schedule)
    assert seen["unit_taylor"][2 * steps] == [2 * steps % 5, (2 * steps + 1) % 5]
    model = MODELS["llama"]()
    whole, all_of_them = (dataclasses.replace(method, batches=count).plan(model, data) for count in (None, 9))
    assert whole.layers == all_of_them.layers
    assert seen["unit_taylor"][-1] == [0, 1, 2, 3, 4]


def test_a_step_looks_at_something():
    with pytest.raises(ConfigError, match=r"AdaptPruner\.batches=0: .* at least 1"):
        AdaptPruner(batches=0)


def test_adapt_pruner_leaves_a_model_below_its_target_alone():
    """Adapt-Pruner, check 8: to the bit."""
    model, dense = MODELS["llama"](), MODELS["llama"]()
    plan = AdaptPruner(parameters=1.0).plan(model, data_for(model))
    assert plan.layers == {}
    apply(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_the_reference_takes_whole_steps():
    """Check 8: at most one step below the target."""
    model = MODELS["llama"]()
    total = sum(one.numel() for one in model.parameters())
    method = AdaptPruner(parameters=0.75, step=0.1, amplitude=0.05, reference=True)
    applied = apply(model, method.plan(model, data_for(model)))
    groups = coupled_groups(MODELS["llama"]()).groups
    step = sum(numbers_of(MODELS["llama"](), group) * group.units for group in groups) * 0.15
    assert (
        0.75 * total - step - max(numbers_of(MODELS["llama"](), group) for group in groups)
        < applied.after
        <= 0.75 * total
    )


def heads_left(plan):
    """Block -> key/value heads, of blocks that lose some."""
    return {
        name: entry.resize.kv_heads for name, entry in plan.layers.items() if entry.resize and entry.resize.kv_heads
    }


def test_attention_of_few_heads_goes_last():
    """Two key/value heads a block: each is half of its attention. Channels meet the budget alone, unless heads are asked for."""
    model = MODELS["llama"]()
    total, data = sum(one.numel() for one in model.parameters()), data_for(model)
    plan = AdaptPruner(parameters=0.7, step=0.05).plan(model, data)
    assert not heads_left(plan)
    assert any("attention=1 cuts it alike" in note for note in plan.notes)
    assert 0.68 * total < apply(MODELS["llama"](), plan).after <= 0.7 * total
    alike = AdaptPruner(parameters=0.7, step=0.05, attention=1.0).plan(model, data)
    assert heads_left(alike)
    assert not any("Attention goes last" in note for note in alike.notes)


def test_attention_goes_once_nothing_else_is_left():
    model = MODELS["llama"]()
    groups = coupled_groups(model).groups
    total = sum(one.numel() for one in model.parameters())
    without = total - sum(numbers_of(model, one) * (one.units - 1) for one in groups if one.kind == "channels")
    plan = AdaptPruner(parameters=without - 1, step=0.2, attention=0.0).plan(model, data_for(model))
    assert heads_left(plan)
    assert apply(MODELS["llama"](), plan).after < without


def test_attention_of_many_heads_is_cut_alike_or_less_as_asked():
    model = MODELS["opt"]()
    data = Batches((inputs_for("opt", model),), {})
    plans = [
        AdaptPruner(parameters=0.7, step=0.05, attention=share).plan(model, data) for share in (None, 1.0, 0.4, 0.0)
    ]
    cut = [sum(4 - heads for heads in heads_left(plan).values()) for plan in plans]
    assert cut[0] == cut[1] > cut[2] > cut[3] == 0


@pytest.mark.parametrize("attention", [-0.1, 1.5])
def test_attention_is_a_share(attention):
    with pytest.raises(ConfigError, match="give a share, 0 to 1"):
        AdaptPruner(attention=attention)
