"""Trying plans: pruned within, dense again afterwards, and the same masks as a walk over the dense model's statistics."""

import copy

import pytest
import torch

import layerwise as lw
from layerwise.engine import Settings, Trials, compress
from layerwise.errors import PlanError
from layerwise.structure import structure_of
from layerwise.tasks import Batches
from models import MODELS, inputs_for


def _case(name, include=()):
    model = MODELS[name]().eval()
    data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})
    return model, structure_of(model, include=include), data


@pytest.mark.parametrize(
    "solver", [lw.solvers.Magnitude(), lw.solvers.Wanda(), lw.solvers.SparseGPT(), lw.solvers.Random()]
)
@pytest.mark.parametrize(
    ("name", "include"),
    [
        ("llama", ()),
        ("mixtral", ()),
        ("t5", ()),
        ("cifar_resnet", ()),
        ("cifar_resnet", ("*",)),
        ("llama", ("lm_head", "*_proj")),
        ("llama", ("lm_head",)),
    ],
)
def test_a_trial_prunes_as_a_walk_does_and_leaves_no_trace(name, include, solver):
    model, structure, data = _case(name, include)
    before = copy.deepcopy(model.state_dict())
    plan = lw.methods.Uniform(sparsity=0.5).plan(model, structure=structure)
    walked = copy.deepcopy(model)
    propagate = "compressed" if solver.needs == "gram" else "dense"
    compress(walked, plan, solver=solver, data=data, settings=Settings(propagate=propagate), structure=structure)
    trials = Trials(model, structure, solver, data)
    for _ in range(2):  # the second as the first
        with trials.pruned(plan):
            for key, value in walked.state_dict().items():
                assert torch.equal(model.state_dict()[key], value), key
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_weights_come_back_after_an_error():
    model, structure, data = _case("llama")
    before = copy.deepcopy(model.state_dict())
    trials = Trials(model, structure, lw.solvers.Wanda(), data)
    plan = lw.methods.Uniform(sparsity=0.5).plan(model, structure=structure)
    with pytest.raises(RuntimeError, match="look"), trials.pruned(plan):
        raise RuntimeError("look")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other = lw.methods.Uniform(sparsity=0.5).plan(MODELS["gpt2"]())
    with pytest.raises(PlanError), trials.pruned(other):
        pass
