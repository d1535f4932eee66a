"""Pruning and training in turn: targets of stages, one schedule, going on after a kill."""

import copy
import dataclasses

import pytest
import torch

from layerwise.errors import ConfigError, DataError
from layerwise.methods.adapt_accel import adapt_accel
from layerwise.methods.adapt_pruner import AdaptPruner, stage_targets
from layerwise.recover import Recovery
from layerwise.shrink import apply
from layerwise.structure import coupled_groups
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for

pytest.importorskip("accelerate")
METHOD = AdaptPruner(parameters=0.7, step=0.05, amplitude=0.02, attention=1.0)


def batches(model, count, first=0):
    return Batches(tuple(inputs_for("llama", model, seed=first + seed) for seed in range(count)), {})


def run(tmp_path, model, **more):
    settings = {"recovery": Recovery(steps=12, lr=1e-3, looks=6), "stages": 3, "work": tmp_path / "work", **more}
    return adapt_accel(model, METHOD, batches(model, 2), batches(model, 12, 10), batches(model, 2, 50), **settings)


def test_stages_meet_their_targets_and_train(tmp_path):
    model = MODELS["llama"]()
    total = sum(one.numel() for one in model.parameters())
    costs = max(96, 2 * 8 * 32 * 3)
    seen = []
    dense = copy.deepcopy(model)
    result = run(
        tmp_path, model, teacher=copy.deepcopy(model), progress=lambda stage, stages, _: seen.append((stage, stages))
    )
    found = result.stages
    apply(dense, result.plan)  # the plan names the units that are left
    assert [one.shape for one in dense.parameters()] == [one.shape for one in model.parameters()]
    for stage, target in zip(found, stage_targets(total, int(total * 0.7), 3), strict=True):
        assert target - costs < stage.parameters <= target
        assert stage.after <= stage.before
    assert found[-1].parameters == sum(one.numel() for one in model.parameters())
    assert [stage.steps for stage in found] == [2, 4, 6]
    assert {*seen} == {(0, 3), (1, 3), (2, 3)}
    assert any(
        group.units < 2 for group in coupled_groups(model).groups if group.kind == "heads"
    )  # attention is not starved


def test_killed_it_goes_on_to_the_same_bits(tmp_path):
    whole = MODELS["llama"]()
    run(tmp_path / "whole", whole)

    def stop(stage, stages, moment):
        if stage == 1 and moment.step == 2:
            raise KeyboardInterrupt

    model = MODELS["llama"]()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", model, progress=stop)
    again = MODELS["llama"]()
    run(tmp_path / "part", again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("reference", [False, True])
def test_the_code_starts_its_schedule_anew_in_every_stage(tmp_path, monkeypatch, reference):
    given, plan = [], AdaptPruner.plan

    def told(method, *parts, schedule=None, **more):
        given.append(schedule)
        return plan(method, *parts, schedule=schedule, **more)

    monkeypatch.setattr(AdaptPruner, "plan", told)
    model = MODELS["llama"]()
    method, data = dataclasses.replace(METHOD, parameters=0.9, reference=reference), batches(model, 3)
    recovery = Recovery(steps=2, looks=1)
    adapt_accel(model, method, data, data, data, recovery=recovery, stages=2, work=tmp_path)
    assert len(given) == 2
    assert all((one is None) == reference for one in given)


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (AdaptPruner(parameters=0.9, step=0.1, reference=True), 4),  # its last step is whole
        (AdaptPruner(parameters=0.985, step=0.05), 10),  # targets lie closer than units
    ],
)
def test_a_model_that_is_below_the_target_of_a_stage_loses_nothing_in_it(tmp_path, method, stages):
    """Adapt-Pruner, check 8. It is trained all the same."""
    model, dense = MODELS["llama"](), MODELS["llama"]()
    total = sum(one.numel() for one in model.parameters())
    data = batches(model, 60)
    held, recovery = Batches(tuple(data[:2]), {}), Recovery(steps=stages, looks=1)
    result = adapt_accel(model, method, held, data, held, recovery=recovery, stages=stages, work=tmp_path)
    targets = [*stage_targets(total, int(total * method.parameters), stages)]
    sizes = [total, *(stage.parameters for stage in result.stages)]
    below = [stage for stage in range(stages) if sizes[stage] <= targets[stage]]
    assert below
    assert all(sizes[stage + 1] == sizes[stage] for stage in below)
    assert all(size <= target for size, target in zip(sizes[1:], targets, strict=True))
    assert all(stage.steps for stage in result.stages)
    assert result.plan.scores
    apply(dense, result.plan)
    assert [one.shape for one in dense.parameters()] == [one.shape for one in model.parameters()]


def test_bad_requests(tmp_path):
    with pytest.raises(ConfigError, match="stages=0"):
        run(tmp_path, MODELS["llama"](), stages=0)
    with pytest.raises(DataError, match="slices that grow"):
        run(tmp_path, MODELS["llama"](), stages=9)
    with pytest.raises(ConfigError, match="schedule"):
        Recovery(steps=1, schedule="constant")
    with pytest.raises(ConfigError, match="begin"):
        Recovery(steps=1, begin=0.5, end=0.5)
