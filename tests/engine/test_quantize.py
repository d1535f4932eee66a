"""The walk with plans of bits: codes that are the weights, both treatments at once, resume, what is refused."""

import json
import re

import pytest
import torch

from layerwise.engine import BlockFinished, LayerSolved, Settings, compress, walk
from layerwise.errors import ConfigError, DataError, PlanError
from layerwise.io.load import load
from layerwise.io.stream import load_streamed
from layerwise.plan import Budget, CacheBits, Plan, Prune, Quantize, Treatments
from layerwise.solvers import GPTQ, HQQ, RoundToNearest, SparseGPT, Wanda, factor
from layerwise.structure import from_matrices, parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for

SOLVERS = [RoundToNearest(), HQQ(), GPTQ()]


def setup(name="llama"):
    model = MODELS[name]().eval()
    data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(3)), {})
    return model, structure_of(model), data


def plan_of(structure, bits=3, group=8, **more):
    """Groups of `group` where they divide the inputs, else one a row."""
    return Plan(
        layers={
            layer.name: Treatments(quantize=Quantize(bits=bits, group=None if layer.columns % group else group), **more)
            for layer in structure.layers
        }
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_codes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for part in ("values", "scale", "zero"):
            assert torch.equal(getattr(a[name], part), getattr(b[name], part)), (name, part)
        for part in ("bits", "group", "symmetric", "shift", "scale_dtype"):
            assert getattr(a[name], part) == getattr(b[name], part)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "convnext", "t5"])
def test_weights_are_their_codes_in_every_kind_of_layer_and_nothing_else_changes(name, solver):
    model, structure, data = setup(name)
    before = weights(model)
    result = compress(model, plan_of(structure), solver=solver, data=data)
    assert list(result.codes) == [event.layer for event in result.layers]
    assert set(result.codes) == {layer.name for layer in structure.layers}
    for layer in structure.layers:
        codes = result.codes[layer.name]
        new = codes.weight().reshape(layer.matrices, layer.rows, layer.columns)
        assert torch.equal(parameter_of(model, layer), from_matrices(new, layer))
        assert len(torch.unique(codes.values)) <= 8
        assert not torch.equal(parameter_of(model, layer), before[layer.parameter])
    touched = {layer.parameter for layer in structure.layers}
    for other, parameter in model.named_parameters():
        assert other in touched or torch.equal(parameter, before[other])


def test_bits_are_counted_with_scales_zeros_and_dense_parts():
    model, structure, data = setup()
    result = compress(model, plan_of(structure, bits=3, group=8), solver=GPTQ(), data=data)
    assert result.bits == pytest.approx(3 + (16 + 3) / 8)
    assert result.nominal_bits == 3
    size = sum(layer.size for layer in structure.layers)
    every = sum(parameter.numel() for parameter in model.parameters())
    assert result.model_bits == pytest.approx((size * result.bits + (every - size) * 32) / every)
    assert result.zeros == 0
    assert result.size == 0  # no budget of zeros
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["bits"] == pytest.approx(result.bits)
    assert "codes" not in plain
    assert plain["layers"][0]["bits"] == pytest.approx(5.375)


def test_mixed_bits_in_one_pass_equal_uniform_runs_as_far_as_these_agree():
    """k blocks in low bits: none and all are the uniform plans to the bit, and blocks before the first difference, too."""
    runs = {}
    for low in (0, 1, 2):
        model, structure, data = setup()
        chosen = {block.name for block in structure.blocks[len(structure.blocks) - low :]}
        plan = Plan(
            layers={layer.name: Quantize(bits=2 if layer.block in chosen else 4, group=8) for layer in structure.layers}
        )
        runs[low] = compress(model, plan, solver=GPTQ(), data=data).codes, weights(model), structure
    for bits, low in ((4, 0), (2, 2)):
        model, structure, data = setup()
        uniform = compress(model, plan_of(structure, bits), solver=GPTQ(), data=data)
        same_codes(uniform.codes, runs[low][0])
        assert all(torch.equal(one, runs[low][1][name]) for name, one in model.named_parameters())
    first, second = (block.name for block in runs[1][2].blocks)
    same_codes(*({name: one for name, one in runs[low][0].items() if name.startswith(f"{first}.")} for low in (0, 1)))
    assert {codes.bits for name, codes in runs[1][0].items() if name.startswith(f"{second}.")} == {2}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_and_bits_of_one_plan_are_both_met(pattern):
    model, structure, data = setup()
    plan = plan_of(structure, bits=4, prune=Prune(sparsity=0.5, pattern=pattern))
    only = structure.layers[-1].name
    plan = plan.model_copy(update={"layers": {**plan.layers, only: Treatments(quantize=Quantize(bits=8, group=8))}})
    result = compress(model, plan, solver=GPTQ(), data=data)
    planned = plan.zeros(structure.layers)
    assert {event.layer: event.zeros for event in result.layers if event.pruned} == planned
    assert [event.layer for event in result.layers if not event.pruned] == [only]
    assert result.sparsity == pytest.approx(0.5)
    for layer in structure.layers:
        weight = parameter_of(model, layer)
        assert int((weight == 0).sum()) >= planned.get(layer.name, 0)
        if pattern == "2:4" and layer.name != only:
            assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert result.codes[only].bits == 8


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bits_and_codes(tmp_path, name, solver):
    model, structure, data = setup(name)
    plan = plan_of(structure)
    expected, settings = compress(model, plan, solver=solver, data=data), Settings(work=str(tmp_path / "work"))
    broken, _, _ = setup(name)
    for event in walk(broken, plan, solver, data, settings=settings):
        if isinstance(event, LayerSolved) and event.layer.startswith(structure.blocks[1].name):
            break  # killed in the middle of the second block
    again, _, _ = setup(name)
    finished = []
    result = compress(again, plan, solver=solver, data=data, settings=settings, progress=finished.append)
    assert next(event.resumed for event in finished if isinstance(event, BlockFinished))
    same_codes(result.codes, expected.codes)
    assert result.layers == expected.layers
    assert all(torch.equal(one, weights(model)[key]) for key, one in again.named_parameters())


def test_a_damaged_file_of_codes_is_one_line(tmp_path):
    model, structure, _ = setup()
    plan, settings = plan_of(structure), Settings(work=str(tmp_path))
    compress(model, plan, solver=RoundToNearest(), settings=settings)
    file = tmp_path / "blocks" / f"{structure.blocks[0].name}.codes"
    file.write_bytes(file.read_bytes()[:100])
    again, _, _ = setup()
    with pytest.raises(ConfigError, match=r"damaged .*Remove the work folder to start again"):
        compress(again, plan, solver=RoundToNearest(), settings=settings)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_in_the_dtype_that_the_model_will_be_loaded_in(dtype, solver):
    model, structure, data = setup()
    result = compress(model.to(dtype), plan_of(structure, bits=4), solver=solver, data=data)
    for layer in structure.layers:
        codes = result.codes[layer.name]
        assert codes.scale_dtype == dtype
        assert torch.equal(codes.scale, codes.scale.to(dtype).float())
        assert torch.equal(parameter_of(model, layer), codes.weight().to(dtype))
    chosen = compress(
        setup()[0].to(dtype), plan_of(structure), solver=RoundToNearest(scales="float32"), data=data
    ).codes
    assert {codes.scale_dtype for codes in chosen.values()} == {torch.float32}


def test_what_a_plan_says_of_the_cache_is_left_to_who_runs_the_model():
    model, structure, data = setup()
    attention = structure.layers[0].name.rpartition(".")[0]
    layers = {structure.layers[0].name: Quantize(bits=4, group=8), attention: CacheBits(key_bits=8, value_bits=4)}
    result = compress(model, Plan(layers=layers), solver=GPTQ(), data=data)
    assert list(result.codes) == [structure.layers[0].name]


@pytest.mark.parametrize(
    ("solver", "layer", "message"),
    [
        (Wanda(), Quantize(bits=4, group=8), 'solver "wanda" cannot quantize, only prune (1 such layers)'),
        (SparseGPT(), Quantize(bits=4, group=8), 'solver "sparsegpt" cannot quantize, only prune'),
        (RoundToNearest(), Prune(sparsity=0.5), 'solver "round_to_nearest" cannot prune, only quantize'),
        (GPTQ(), Quantize(bits=16, group=8), "16 bits: solvers quantize to 2 to 8. A layer left out of the plan keeps"),
        (GPTQ(), Quantize(bits=4, group=7), "do not split into quantization groups of 7"),
        (HQQ(), Quantize(bits=4, group=8, symmetric=True), "moves the zero, which a symmetric grid fixes"),
        (GPTQ(), Prune(sparsity=0.5, pattern="row"), '"gptq" prunes unstructured and n:m alone, not in the pattern'),
        (GPTQ(), Prune(sparsity=0.5, pattern="row"), '"magnitude", "wanda", "sparsegpt", "nowag" and "random" do'),
    ],
)
def test_what_a_solver_cannot_do_is_refused_before_any_work(solver, layer, message):
    model, structure, data = setup()
    before, last = weights(model), structure.layers[-1].name
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        compress(model, Plan(layers={last: layer}), solver=solver, data=data)
    assert last in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


@pytest.mark.parametrize(
    ("solver", "bits", "stored"),
    [(HQQ(), 3 + 32 / 8, "scales and zeros of 16 bits"), (RoundToNearest(scales="float32"), 3 + 35 / 8, "scales of 32 bits")],
)  # fmt: skip
def test_a_budget_is_held_by_what_this_solver_stores_whatever_the_plan_counted(solver, bits, stored):
    model, structure, data = setup()
    before = weights(model)
    whole = plan_of(structure).model_copy(update={"budget": Budget(bits=3 + 19 / 8)}).with_achieved(structure.layers)
    assert whole.budget.achieved_bits == 3 + 19 / 8
    with pytest.raises(PlanError, match=f"with the solver's {stored}") as caught:
        compress(model, whole, solver=solver, data=data)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    roomy = whole.model_copy(update={"budget": Budget(bits=bits)})
    assert compress(model, roomy, solver=solver, data=data).bits == bits


def test_a_factorisation_that_fails_is_told_of_each_layer(monkeypatch):
    monkeypatch.setattr(factor, "_upper_cholesky", lambda gram, diagonal: None)
    model, structure, data = setup()
    other, _, _ = setup()
    result = compress(model, plan_of(structure), solver=GPTQ(), data=data)
    nearest = compress(other, plan_of(structure), solver=RoundToNearest(), data=data)
    same_codes(result.codes, nearest.codes)
    assert [note.partition(": ")[0] for note in result.notes] == [layer.layer for layer in result.layers]
    assert all(note.endswith("(more calibration tokens help): rounded to the nearest") for note in result.notes)


def test_gptq_without_data_names_a_solver_that_needs_none():
    model, structure, _ = setup()
    with pytest.raises(DataError, match='solver "gptq" needs calibration data; "round_to_nearest" needs none'):
        compress(model, plan_of(structure), solver=GPTQ())


def test_codes_of_a_streamed_model_are_read_from_the_work_folder(tmp_path):
    model, _, _ = setup()
    model.save_pretrained(tmp_path / "dense")
    streamed, whole = load_streamed(tmp_path / "dense"), load(tmp_path / "dense")
    structure = structure_of(whole)
    plan = plan_of(structure)
    expected = compress(whole, plan, solver=HQQ())
    result = compress(streamed, plan, solver=HQQ(), settings=Settings(work=str(tmp_path / "work")))
    same_codes(result.codes, expected.codes)
    assert type(result.codes) is not dict
    assert result.model_bits == expected.model_bits
    assert result.nominal_bits == 3
    (tmp_path / "work" / "blocks" / f"{structure.blocks[0].name}.codes").unlink()
    with pytest.raises(ConfigError, match=r"damaged .*Remove the work folder"):
        result.codes[structure.layers[0].name]
