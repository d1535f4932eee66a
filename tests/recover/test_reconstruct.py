"""Blocks tuned to give what the dense ones gave: what was compressed stays so, the error falls, every road ends in the same bits."""

import dataclasses

import pytest
import torch

from layerwise.engine import BlockFinished, BlockTuned, LayerSolved, Settings, compress, walk
from layerwise.errors import ConfigError, DataError
from layerwise.io import load, save
from layerwise.io.stream import load_streamed
from layerwise.plan import Factorize, Plan, Prune, Quantize, Treatments
from layerwise.recover import Reconstruction
from layerwise.recover.forms import rounded
from layerwise.solvers import ARMOR, GPTQ, HQQ, Magnitude, RoundToNearest, Wanda
from layerwise.structure import factorable, from_matrices, parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for
from tiny import tiny_llama

BRISK = Reconstruction(epochs=3, lr=1e-3, ratio_lr=1e-2)


def setup(name="llama", count=4, dtype=torch.float32, *, alike=True):
    """alike: all batches are the same, so that what helps on those that are tuned on helps on those that judge."""
    model = MODELS[name]().eval().to(dtype)
    data = Batches(tuple(inputs_for(name, model, seed=0 if alike else seed) for seed in range(count)), {})
    return model, structure_of(model), data


def words():
    """For `tiny_llama`."""
    draw = torch.Generator().manual_seed(0)
    return Batches(tuple({"input_ids": torch.randint(64, (2, 32), generator=draw)} for _ in range(4)), {})


def pruned(structure, sparsity=0.5, **more):
    return Plan(layers={one.name: Prune(sparsity=round(sparsity * one.size) / one.size, **more) for one in structure})


def coded(structure, bits=3, group=8):
    own = {one.name: None if one.columns % group else group for one in structure}
    return Plan(layers={name: Treatments(quantize=Quantize(bits=bits, group=each)) for name, each in own.items()})


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "dense") for name in MODELS), *((name, "same") for name in ("llama", "t5", "sd3"))]
)
def test_every_architecture_keeps_its_zeros_and_gets_no_worse(name, target):
    model, structure, data = setup(name)
    plan = pruned(structure)
    solved = MODELS[name]().eval()
    compress(solved, plan, solver=Wanda(), data=data)
    result = compress(model, plan, solver=Wanda(), data=data, tuner=dataclasses.replace(BRISK, target=target))
    blocks = {layer.block for layer in structure if layer.block is not None}
    assert {one.block for one in result.tuned} == blocks
    assert all(one.after <= one.before for one in result.tuned)
    assert all(one.after < one.before or "left as it was solved" in one.note for one in result.tuned)
    assert any(one.after < one.before for one in result.tuned)
    assert {event.layer: event.zeros for event in result.layers} == plan.zeros(structure.layers)
    first = next(block.name for block in structure.blocks if block.name in blocks)  # solved from the same inputs
    for layer in structure:
        if layer.block == first:
            assert torch.equal(parameter_of(model, layer) != 0, parameter_of(solved, layer) != 0)
    assert not same(weights(model), weights(solved))
    assert all(not module.training for module in model.modules())
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("pattern", [{"pattern": "2:4"}, {"pattern": "block(4x4)"}, {"pattern": "row"}])
def test_patterns_hold(pattern):
    model, structure, data = setup()
    result = compress(model, pruned(structure, **pattern), solver=Magnitude(), data=data, tuner=BRISK)
    assert any(one.after < one.before for one in result.tuned)
    for layer in structure:
        weight = parameter_of(model, layer).detach()
        if pattern["pattern"] == "2:4":
            assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
        elif pattern["pattern"] == "row":
            assert set((weight != 0).sum(1).tolist()) == {0, layer.columns}
        else:
            blocks = weight.reshape(layer.rows // 4, 4, layer.columns // 4, 4).transpose(1, 2).flatten(2)
            assert set((blocks != 0).sum(-1).flatten().tolist()) <= {0, 16}


@pytest.mark.parametrize("solver", [RoundToNearest(), RoundToNearest(grid="shift"), HQQ(), GPTQ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_move_and_codes_stay(solver, dtype):
    plain, structure, data = setup(dtype=dtype)
    before = compress(plain, coded(structure), solver=solver, data=data)
    model, _, _ = setup(dtype=dtype)
    result = compress(model, coded(structure), solver=solver, data=data, tuner=BRISK)
    assert any(one.after < one.before for one in result.tuned)
    moved = 0
    for layer in structure:
        codes = result.codes[layer.name]
        expected = from_matrices(codes.weight().reshape(layer.matrices, layer.rows, layer.columns), layer)
        assert torch.equal(parameter_of(model, layer).detach(), expected.to(dtype))
        assert torch.equal(codes.scale, codes.scale.to(codes.scale_dtype).float())
        assert (codes.scale > 0).all()
        if codes.shift:  # what a format stores is the weight of code 0
            stored = codes.zero * codes.scale
            torch.testing.assert_close(stored, stored.to(codes.scale_dtype).float(), rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(codes.zero, codes.zero.round())
        if layer.block == structure.blocks[0].name:  # solved from the same inputs as without
            old = before.codes[layer.name]
            assert torch.equal(codes.values, old.values)
            moved += not torch.equal(codes.scale, old.scale)
    assert moved


def test_packed_folders_hold_the_scales_that_were_found(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_llama(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="bfloat16")
    structure = structure_of(model)
    data = words()
    plan = coded(structure, bits=4)
    result = compress(model, plan, solver=RoundToNearest(), data=data, tuner=BRISK)
    save(model, tmp_path / "out", plan=plan, codes=result.codes, dense=tmp_path / "dense", verify=False)
    assert any(one.after < one.before for one in result.tuned)
    again = load(tmp_path / "out")
    assert same(weights(again), weights(model))


def test_factors_keep_their_pattern():
    model, structure, data = setup()
    plan = Plan(layers={one.name: Factorize(block=4) for one in structure if factorable(one)})
    result = compress(model, plan, solver=ARMOR(iterations=3), data=data, tuner=BRISK)
    assert any(one.after < one.before for one in result.tuned)
    for layer in structure:
        if layer.name in result.factors:
            factors = result.factors[layer.name]
            torch.testing.assert_close(parameter_of(model, layer).detach(), factors.weight())
            assert (factors.keep.reshape(layer.rows, -1, 4).sum(-1) == 2).all()


def test_the_error_is_of_batches_that_it_was_not_tuned_on():
    """By hand: the last pass of the dense model against the compressed prefix, at the last block."""
    model, structure, data = setup(alike=False)
    dense = setup()[0]
    result = compress(model, pruned(structure), solver=Wanda(), data=data, tuner=BRISK)
    found = {}
    for which, one in (("dense", dense), ("tuned", model)):
        handle = one.get_submodule(structure.blocks[-1].name).register_forward_hook(
            lambda module, args, output, which=which: found.__setitem__(
                which, output[0] if isinstance(output, tuple) else output
            )
        )
        with torch.no_grad():
            one(**data[-1])
        handle.remove()
    error = (found["tuned"] - found["dense"]).square().sum() / found["dense"].square().sum()
    assert result.tuned[-1].after == pytest.approx(float(error), rel=1e-5)


def test_same_seed_same_bits_and_global_streams_are_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ends = []
    for seed in (0, 0, 1):
        model, structure, data = setup(alike=False)
        compress(
            model, pruned(structure), solver=Wanda(), data=data, tuner=dataclasses.replace(BRISK, seed=seed, epochs=1)
        )
        ends.append(weights(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize("form", ["pruned", "coded"])
def test_killed_and_started_again_it_ends_in_the_same_bits(tmp_path, form):
    plan_of, solver = (pruned, Wanda()) if form == "pruned" else (coded, GPTQ())
    once, structure, data = setup()
    whole = compress(once, plan_of(structure), solver=solver, data=data, tuner=BRISK)
    settings = Settings(work=str(tmp_path / "work"))
    model, _, _ = setup()
    for event in walk(model, plan_of(structure), solver, data, settings=settings, tuner=BRISK):
        if isinstance(event, BlockFinished):
            break  # as a kill would
    again, _, _ = setup()
    result = compress(again, plan_of(structure), solver=solver, data=data, settings=settings, tuner=BRISK)
    assert same(weights(again), weights(once))
    timeless = [dataclasses.replace(one, seconds=0.0) for one in result.tuned]
    assert timeless == [dataclasses.replace(one, seconds=0.0) for one in whole.tuned]
    for name, codes in whole.codes.items():
        assert torch.equal(codes.scale, result.codes[name].scale)


def test_a_run_with_other_settings_is_refused(tmp_path):
    model, structure, data = setup()
    settings = Settings(work=str(tmp_path / "work"))
    compress(model, pruned(structure), solver=Wanda(), data=data, settings=settings, tuner=BRISK)
    for other in (None, dataclasses.replace(BRISK, lr=1e-4)):
        with pytest.raises(ConfigError, match="tuned"):
            compress(setup()[0], pruned(structure), solver=Wanda(), data=data, settings=settings, tuner=other)


def test_streamed_and_spilled_runs_end_in_the_same_bits(tmp_path):
    tiny_llama(tmp_path / "dense")
    model = load(tmp_path / "dense")
    structure = structure_of(model)
    plan = pruned(structure)
    data = words()
    compress(model, plan, solver=Wanda(), data=data, tuner=BRISK)
    spilled = load(tmp_path / "dense")
    compress(spilled, plan, solver=Wanda(), data=data, settings=Settings(spill=str(tmp_path / "spill")), tuner=BRISK)
    assert same(weights(spilled), weights(model))
    streamed = load_streamed(tmp_path / "dense")
    work = str(tmp_path / "work")
    compress(streamed, plan, solver=Wanda(), data=data, settings=Settings(work=work), tuner=BRISK)
    for name, weight in weights(model).items():
        found = streamed.get_parameter(name)
        got = streamed.layerwise_store.read(name) if found.is_meta else found.detach()
        assert torch.equal(got, weight), name


def test_order_of_events():
    model, structure, data = setup()
    kinds = [type(event) for event in walk(model, pruned(structure), Wanda(), data, tuner=BRISK)]
    tuned = kinds.index(BlockTuned)
    assert kinds[tuned - 1] is LayerSolved
    assert kinds[tuned + 1] is BlockFinished
    assert kinds.count(BlockTuned) == len(structure.blocks)


def test_dense_propagation_has_its_targets_already():
    model, structure, data = setup()
    result = compress(model, pruned(structure), solver=Wanda(), data=data, settings=Settings("dense"), tuner=BRISK)
    assert all(one.after < one.before for one in result.tuned)


@pytest.mark.parametrize("earlier", ["pruned", "coded"])
def test_what_an_earlier_run_compressed_stays_so(earlier):
    """Attention first, then the MLPs, tuned: zeros of the first are not filled, codes of the first not left."""
    model, structure, data = setup()
    with torch.no_grad():
        for one in structure:
            parameter_of(model, one).mul_(4)  # so that there is something to be gained
    first, second = ([one for one in structure if part in one.name] for part in ("self_attn", "mlp"))
    if earlier == "pruned":
        compress(model, pruned(first), solver=Magnitude())
    else:
        compress(model, coded(first), solver=RoundToNearest())
    before = {one.name: parameter_of(model, one).detach().clone() for one in first}
    gentle = dataclasses.replace(BRISK, lr=1e-4)
    result = compress(model, pruned(second), solver=Wanda(), data=data, tuner=gentle)
    assert all(one.after < one.before for one in result.tuned)
    for one in first:
        found = parameter_of(model, one)
        assert torch.equal(found != 0, before[one.name] != 0)
        assert torch.equal(found, before[one.name]) == (earlier == "coded")


def test_a_batch_is_left_to_tune_on():
    model, structure, data = setup(count=2)
    result = compress(
        model, pruned(structure), solver=Wanda(), data=data, tuner=dataclasses.replace(BRISK, held_out=0.9)
    )
    assert all(one.steps > 0 for one in result.tuned)


def test_steps_that_only_harm_leave_the_solver_s_weights():
    model, structure, data = setup()
    plain = setup()[0]
    compress(plain, pruned(structure), solver=Wanda(), data=data)
    wild = Reconstruction(lr=1e6, epochs=1)
    result = compress(model, pruned(structure), solver=Wanda(), data=data, tuner=wild)
    assert all(one.note.startswith("left as it was solved") and one.after == one.before for one in result.tuned)
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"lr": 0}, {"ratio_lr": float("inf")}, {"target": "both"}, {"held_out": 1.0}, {"patience": 0}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Reconstruction(**wrong)


def test_what_cannot_work_is_said_before_any_work():
    model, structure, data = setup()
    before = weights(model)
    with pytest.raises(DataError, match="some batches and judges by others"):
        compress(model, pruned(structure), solver=Wanda(), data=Batches(tuple(data)[:1], {}), tuner=BRISK)
    with pytest.raises(DataError, match="calibration data"):
        compress(model, pruned(structure), solver=Magnitude(), tuner=BRISK)
    assert same(weights(model), before)
    with pytest.raises(ConfigError, match="float16"):
        compress(model.half(), pruned(structure), solver=Wanda(), data=data, tuner=BRISK)


def test_rounding_is_exact_and_passes_gradients_on():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = rounded(values, torch.bfloat16)
    assert torch.equal(found.detach(), values.detach().bfloat16().float())
    (found * 3).sum().backward()
    assert torch.equal(values.grad, torch.full((1000,), 3.0))
