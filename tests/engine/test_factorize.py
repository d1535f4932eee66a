"""The walk with plans of factors: weights that are their factors, bits counted, resume, streaming, what is refused."""

import dataclasses
import json

import pytest
import torch

from layerwise.engine import BlockFinished, LayerSolved, Settings, compress, walk
from layerwise.errors import DataError, PlanError
from layerwise.io.load import load
from layerwise.io.stream import load_streamed
from layerwise.plan import Factorize, Plan, Prune
from layerwise.solvers import ARMOR, Wanda
from layerwise.solvers.factors import PARTS
from layerwise.structure import factorable, parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for
from tiny import tiny_llama

SOLVER = ARMOR(iterations=3)


def setup(name="llama"):
    model = MODELS[name]().eval()
    data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(3)), {})
    return model, structure_of(model), data


def plan_of(structure, pattern="2:4", block=4):
    return Plan(layers={one.name: Factorize(block=block, pattern=pattern) for one in structure if factorable(one)})


def same_factors(a, b):
    assert list(a) == list(b)
    for name in a:
        assert (a[name].n, a[name].m) == (b[name].n, b[name].m)
        for part in PARTS:
            assert torch.equal(getattr(a[name], part), getattr(b[name], part)), (name, part)


@pytest.mark.parametrize(("name", "pattern"), [("llama", "2:4"), ("llama", "1:4"), ("gpt2", "2:4"), ("t5", "3:4")])
def test_weights_are_their_factors_and_nothing_else_changes(name, pattern):
    model, structure, data = setup(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    plan = plan_of(structure, pattern)
    result = compress(model, plan, solver=SOLVER, data=data)
    assert list(result.factors) == [event.layer for event in result.layers]
    assert set(result.factors) == set(plan.layers)
    for layer in structure:
        if layer.name in plan.layers:
            product = result.factors[layer.name].weight()
            torch.testing.assert_close(parameter_of(model, layer).detach(), product.T if layer.transposed else product)
            assert result.factors[layer.name].values.dtype == torch.float32
    touched = {layer.parameter for layer in structure if layer.name in plan.layers}
    assert all(
        other in touched or torch.equal(parameter, before[other]) for other, parameter in model.named_parameters()
    )


def test_bits_are_counted_with_positions_factors_and_dense_parts():
    model, structure, data = setup()
    model = model.bfloat16()
    plan = plan_of(structure)
    result = compress(model, plan, solver=SOLVER, data=data)
    size = sum(layer.size for layer in structure)
    stored = sum(factors.stored_bits for factors in result.factors.values())
    assert result.bits == pytest.approx(stored / size) == pytest.approx(plan.achieved_bits(structure.layers))
    assert plan.achieved_bits(structure.layers, nominal=True) == 9
    every = sum(parameter.numel() for parameter in model.parameters())
    assert result.model_bits == pytest.approx((size * result.bits + (every - size) * 16) / every)
    assert result.nominal_bits is None
    assert (result.zeros, result.size) == (0, 0)  # no budget of zeros
    plain = json.loads(json.dumps(result.to_dict()))
    assert "factors" not in plain
    assert not {"codes", "factors"} & set(plain["layers"][0])


def test_the_storage_is_that_of_the_model_unless_given():
    for dtype, given, wanted in (
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float64, "auto", torch.float32),
        (torch.float32, "float16", torch.float16),
    ):
        model, structure, data = setup()
        solver = dataclasses.replace(SOLVER, storage=given)
        result = compress(model.to(dtype), plan_of(structure), solver=solver, data=data)
        assert {factors.values.dtype for factors in result.factors.values()} == {wanted}


def test_a_killed_run_goes_on_to_the_same_factors(tmp_path):
    model, structure, data = setup()
    plan = plan_of(structure)
    whole = compress(model, plan, solver=SOLVER, data=data)
    again, _, _ = setup()
    settings = Settings(work=str(tmp_path / "work"))
    for event in walk(again, plan, SOLVER, data, settings=settings):
        if isinstance(event, BlockFinished):
            break
    killed, _, _ = setup()
    seen = []
    result = compress(killed, plan, solver=SOLVER, data=data, settings=settings, progress=seen.append)
    assert next(event.resumed for event in seen if isinstance(event, BlockFinished))
    same_factors(result.factors, whole.factors)
    assert result.bits == whole.bits
    for a, b in zip(killed.parameters(), model.parameters()):
        assert torch.equal(a, b)
    resumed = next(event for event in seen if isinstance(event, LayerSolved))
    assert resumed.factors is not None


def test_streamed_models_keep_their_factors_in_the_work_folder(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    data = Batches(tuple({"input_ids": torch.arange(20).view(1, 20) + seed} for seed in range(3)), {})
    whole = load(folder)
    plan = plan_of(structure_of(whole), block=8)
    expected = compress(whole, plan, solver=SOLVER, data=data)
    settings = Settings(work=str(tmp_path / "work"))
    result = compress(load_streamed(folder), plan, solver=SOLVER, data=data, settings=settings)
    same_factors(result.factors, expected.factors)
    assert not isinstance(result.factors, dict)


def test_what_cannot_be_done_is_refused_before_any_work():
    model, structure, data = setup()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    plan = plan_of(structure)
    with pytest.raises(DataError, match='solver "armor" needs calibration data'):
        compress(model, plan, solver=SOLVER)
    with pytest.raises(PlanError, match='solver "wanda" cannot factorize, only prune'):
        compress(model, plan, solver=Wanda(), data=data)
    with pytest.raises(PlanError, match='solver "armor" cannot prune, only factorize'):
        compress(model, Plan(layers={structure.layers[0].name: Prune(sparsity=0.5)}), solver=SOLVER, data=data)
    with pytest.raises(PlanError, match="do not split into diagonal blocks of 512"):
        compress(model, Plan(layers={structure.layers[0].name: Factorize(block=512)}), solver=SOLVER, data=data)
    for name, what in (("mixtral", "experts"), ("cifar_resnet", "conv")):
        other, own, inputs = setup(name)
        layer = next(one for one in own if one.kind == what)
        block = 1 if layer.columns % 4 else 4
        with pytest.raises(PlanError, match=rf"is a {what} layer; factorize is for linears|do not split"):
            compress(
                other,
                Plan(layers={layer.name: Factorize(block=block, pattern=f"1:{block}")}),
                solver=SOLVER,
                data=inputs,
            )
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
