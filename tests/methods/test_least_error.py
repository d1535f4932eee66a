import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import layerwise.solvers as solvers
from layerwise.engine import compress
from layerwise.errors import ConfigError, ModelError
from layerwise.methods import LWQ, LeastError, method_from
from layerwise.methods.handing_out import dealt
from layerwise.methods.least_error import over_units
from layerwise.methods.level_errors import divergences, output_errors
from layerwise.passes import collect_dense
from layerwise.plan import Quantize
from layerwise.scores import output_gradients
from layerwise.structure import structure_of
from layerwise.tasks import Yardstick
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama
from rounding import Rounding

SMALL = {"group": 16, "solver": "rounding", "granularity": "layer"}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(solvers.SOLVERS, "rounding", Rounding)


@pytest.fixture(scope="module")
def llama():
    model = small_llama(
        0, vocab_size=96, num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_key_value_heads=1
    )
    return model, Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})


def measured(model, data, weighting, **more):
    method = LeastError(**{**SMALL, **more})
    return output_errors(model, data, dealt(method, method, model, None), Rounding(), weighting)


def changed(model, layer, level):
    """Squared differences of this layer's outputs on its own inputs, (tokens, rows), by running it."""
    module, seen = model.get_submodule(layer), []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for seed in range(2):
            model(**inputs_for("llama", model, seed=seed))
    handle.remove()
    (new,) = Rounding().solve([module.weight.detach()], None, [Quantize(bits=level, group=16)], [None])
    return (torch.cat(seen) @ (module.weight.detach() - new.weight).T).square()


def test_errors_are_those_of_the_outputs(llama):
    model, data = llama
    layer = "model.layers.1.mlp.down_proj"
    plain, notes = measured(model, data, "plain", bits=4.0)
    assert notes == []
    assert list(plain) == [one.name for one in structure_of(model)]
    for level in (2, 4):
        assert plain[layer][level] == pytest.approx(changed(model, layer, level).sum().item(), rel=1e-4)
    relative, _ = measured(model, data, "relative", bits=4.0)
    (gram,) = [of[layer][0].gram for _, of in collect_dense(model, structure_of(model), data, "gram") if layer in of]
    weight = model.get_submodule(layer).weight.detach()
    size = ((weight @ gram) * weight).sum().item()
    assert relative[layer][2] == pytest.approx(plain[layer][2] / size, rel=1e-4)
    gradients = output_gradients(model, data, structure_of(model))[layer][0]
    weighed, _ = measured(model, data, "gradient", bits=4.0)
    squares = changed(model, layer, 2)
    expected = (squares.double().sum(0) * gradients / len(squares)).sum().item()
    assert weighed[layer][2] == pytest.approx(expected, rel=1e-4)
    assert all(of[4] < of[2] for errors in (plain, relative, weighed) for of in errors.values())


def test_the_plan_has_the_least_sum_of_all_orders(llama):
    model, data = llama
    errors, _ = measured(model, data, "plain", bits=4.0, symmetric=False)
    for bits in (3.3, 4.0, 5.0):
        plan = LeastError(bits=bits, measure="plain", symmetric=False, **SMALL).plan(model, data)
        plan.check(structure_of(model).layers)

        def summed(plan):
            return sum(errors[name][entry.quantize.bits] for name, entry in plan.layers.items())

        hull = LeastError(bits=bits, measure="plain", rule="hull", symmetric=False, **SMALL).plan(model, data)
        assert summed(plan) <= summed(hull)
        for seed in range(3):
            control = LWQ(bits=bits, score="random", seed=seed, granularity="layer", group=16, symmetric=False).plan(
                model
            )
            assert summed(plan) < summed(control)


def test_blocks_and_ties_are_decided_together(llama):
    model, data = llama
    structure = structure_of(model)
    tied = LeastError(bits=3.9, target="vllm", levels="2,4,8", **SMALL).plan(model, data)
    for block in structure.blocks:
        bits = {layer.role: tied.layers[layer.name].quantize.bits for layer in block.layers}
        assert bits["q"] == bits["k"] == bits["v"]
        assert bits["gate"] == bits["up"]
    blocks = LeastError(bits=4.5, **{**SMALL, "granularity": "block"}).plan(model, data)
    for block in structure.blocks:
        assert len({blocks.layers[layer.name].quantize.bits for layer in block.layers}) == 1
    assert list(blocks.scores) == [block.name for block in structure.blocks]


def test_errors_measured_once_serve_every_budget(llama):
    model, data = llama
    method = LeastError(bits=5.0, levels="2,3,4,8", **SMALL)
    errors, notes = output_errors(model, data, dealt(method, method, model, None), Rounding(), "gradient")
    for bits in (3.5, 4.2):
        other = LeastError(bits=bits, levels="2,4", **SMALL)
        hand = dealt(other, other, model, None)
        assert other.plan_by(model, hand, over_units(hand, errors), notes) == other.plan(model, data)


def test_experts_and_what_no_token_met():
    model = MODELS["mixtral"]()
    data = Batches(
        ({"input_ids": inputs_for("mixtral", model)["input_ids"][:1, :1]},), {}
    )  # one token, two of four experts
    settings = {"bits": 4.0, "group": 16, "solver": "rounding"}
    plan = LeastError(measure="relative", **settings).plan(model, data)
    assert any("matrices met no token" in note for note in plan.notes)
    with pytest.raises(ModelError, match="Weigh errors another way"):
        LeastError(**settings).plan(model, data)


def test_what_has_no_inputs_keeps_the_highest_level(llama):
    model, data = llama
    structure = structure_of(model, include=["*"])
    plan = LeastError(bits=4.9, measure="plain", **SMALL).plan(model, data, structure=structure)
    assert plan.layers["model.embed_tokens"].quantize.bits == 4
    assert "1 layers without measured errors stay at the highest level." in plan.notes


@dataclass(frozen=True)
class Measuring(Rounding):
    """The same, as a solver that asks for the gram would be handed it."""

    needs: ClassVar[str] = "gram"

    def solve(self, weights, inputs, treatments, generators):
        assert inputs.gram.shape == (weights[0].shape[1],) * 2
        return super().solve(weights, inputs, treatments, generators)


@pytest.mark.parametrize("solver", [Rounding(), Measuring()], ids=["weights alone", "with statistics"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_divergences_are_those_of_the_model_with_one_unit_solved(llama, solver, granularity):
    model, data = llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = LeastError(bits=4.0, measure="divergence", **{**SMALL, "granularity": granularity})
    hand = dealt(method, method, model, None)
    found, notes = divergences(model, data, hand, solver, 3, 0)
    assert list(found) == list(hand.units)
    heads = ("q_proj", "k_proj")  # of random weights they hardly matter: their divergence is rounding
    assert all(of[2] > of[4] > 0 for unit, of in found.items() if not unit.endswith(heads))
    assert notes == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unit = "model.layers.1" if granularity == "block" else "model.layers.1.mlp.down_proj"
    yard = Yardstick(model, list(data))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in hand.units[unit]:
            weight = changed.get_parameter(layer.parameter)
            (new,) = Rounding().solve([weight.clone()], None, [Quantize(bits=2, group=16)], [None])
            weight.copy_(new.weight)
    assert found[unit][2] == pytest.approx(yard.divergence(changed), rel=1e-4)


def test_a_plan_by_divergence_on_some_samples(llama):
    model, data = llama
    plan = LeastError(bits=4.0, measure="divergence", samples=1, **SMALL).plan(model, data)
    plan.check(structure_of(model).layers)
    assert plan.notes == ("divergences on 2 samples of the data.",)
    assert plan.scores["model.layers.1.mlp.down_proj"] > 0


def test_errors_are_those_of_the_very_solver_that_is_named(llama):
    model, data = llama
    settings = {"bits": 4.6, "group": 16, "measure": "plain", "solver": "round_to_nearest"}
    plain = LeastError(**settings)
    searched = LeastError(**settings, solver_set="mse=true,scales=float32")
    assert searched.applied == solvers.RoundToNearest(mse=True, scales="float32")
    hand = dealt(searched, searched, model, None)
    found, _ = searched.measured(model, data, hand)
    assert found == output_errors(model, data, hand, searched.applied, "plain")[0]
    assert found != plain.measured(model, data, dealt(plain, plain, model, None))[0]
    plan = searched.plan(model, data)
    assert plan.budget.scale_bits == 32  # counted, too
    assert method_from(**plan.method) == searched


@pytest.mark.parametrize("measure", ["plain", "divergence"])
def test_scales_are_in_the_dtype_that_compress_would_take(llama, measure):
    model, data = llama
    half = copy.deepcopy(model).to(torch.bfloat16)

    def errors(scales):
        method = LeastError(bits=4.0, group=16, measure=measure, solver_set=f"scales={scales}")
        return method.measured(half, data, dealt(method, method, half, None))[0]

    assert errors("auto") == errors("bfloat16") != errors("float16")


def test_what_the_solver_stores_is_counted(llama):
    model, data = llama
    plan = LeastError(bits=4.0, group=32, symmetric=False, measure="plain", solver="hqq", indivisible="row").plan(
        model, data
    )
    assert plan.budget.shift
    plan.check(structure_of(model).layers)
    assert compress(copy.deepcopy(model), plan, solver=solvers.HQQ()).bits == pytest.approx(plan.budget.achieved_bits)
    assert plan.budget.achieved_bits <= 4.0


def test_an_unknown_solver_is_refused(llama):
    model, data = llama
    with pytest.raises(ConfigError, match='unknown solver "nearest"'):
        LeastError(**{**SMALL, "bits": 4.0, "solver": "nearest"}).plan(model, data)
    with pytest.raises(ConfigError, match='solver rounding has no setting "mse"'):
        LeastError(**SMALL, solver_set="mse=true")
    with pytest.raises(ConfigError, match=r'LeastError.solver_set "mse": write NAME=VALUE'):
        LeastError(solver_set="mse")
    with pytest.raises(ConfigError, match="gradient, divergence, relative, plain"):
        LeastError(measure="hessian")
