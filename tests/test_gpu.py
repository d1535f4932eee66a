"""On CUDA as on the CPU: statistics, every solver, every method, other models, the cache, evaluation. `make test-gpu`."""

import pytest
import torch
from transformers import DynamicCache

import layerwise as lw
from layerwise.io import armor_linears
from layerwise.passes.statistics import Accumulator
from layerwise.solvers import SOLVERS
from layerwise.tasks import text
from models import MODELS, inputs_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

METHODS = [name for name, method in lw.methods.METHODS.items() if name not in ("auto", "kvtuner", "owlore")]


@pytest.fixture(scope="module")
def data():
    return text("python-docs", lw.load_tokenizer("demo"), samples=4, length=128)


def demo(device="cuda", dtype=torch.float32):
    return lw.load("demo", device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "tokens"), [(96, 700), (640, 5000)])  # narrow and in strips, few rows and many
def test_grams_of_half_precision_rows_are_exact_to_float32(dtype, columns, tokens):
    rows = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = Accumulator(columns, "gram", torch.device("cuda"))
    for part in rows.split(600):
        accumulator.add(part.cuda())
    wanted = rows.double().T @ rows.double()
    found = accumulator.result()
    assert found.gram is not None
    torch.testing.assert_close(found.gram.cpu().double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.diagonal().max()))
    assert torch.equal(found.gram, found.gram.T)


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - {"armor"}))
def test_a_solver_finds_on_the_device_what_it_finds_on_the_cpu(name, data):
    solver = SOLVERS[name]()
    prunes = "prune" in solver.treats
    results, weights = [], []
    for device in ("cpu", "cuda"):
        model = demo(device)
        method = (
            lw.methods.Uniform(sparsity=0.5)
            if prunes
            else lw.methods.UniformBits(bits=4, group=32, symmetric=name != "hqq")
        )
        results.append(lw.compress(model, method.plan(model), solver=solver, data=data))
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert results[1].sparsity == results[0].sparsity
    kept = [torch.cat([one[name].flatten() for name in sorted(one) if ".layers." in name]) for one in weights]
    assert float(((kept[0] == 0) != (kept[1] == 0)).float().mean()) < 0.01  # scores that nearly tie
    assert float((kept[0] - kept[1]).square().sum() / kept[0].square().sum()) < 0.01


@pytest.mark.parametrize("reference", [False, True])
def test_armor_on_the_device_is_as_near_as_on_the_cpu_and_its_folder_runs_there(reference, data, tmp_path):
    """Which groups are remasked may differ where gains nearly tie; how near the outputs come does not."""
    found = []
    for device in ("cpu", "cuda"):
        model = demo(device, torch.bfloat16)
        plan = lw.methods.Armor(block=32, overhead=1.0).plan(model)
        result = lw.compress(model, plan, solver=lw.solvers.ARMOR(iterations=3, reference=reference), data=data)
        found.append(lw.evaluate(model, data).perplexity)
        lw.save(model, tmp_path / device, factors=result.factors, verify=False)
    assert found[1] == pytest.approx(found[0], rel=0.02)
    loaded = lw.load(tmp_path / "cuda", device="cuda")
    assert lw.evaluate(loaded, data).perplexity == pytest.approx(found[1], rel=0.02)
    kernels = {module.kernel for module in armor_linears(loaded).values()}
    assert "semi-structured" in kernels


@pytest.mark.parametrize("name", METHODS)
def test_a_method_plans_on_the_device(name, data):
    model = demo()
    settings = {"synflow": {"rounds": 2}, "ecoflap": {"samples": 1}}.get(name, {})
    plan = lw.methods.method_from(name, **settings).plan(model, data)
    assert plan.layers
    if not any(way.resize or way.drop for way in plan.layers.values()):  # those have entries for what loses units
        assert len(plan.layers) == len(lw.structure_of(model).layers)
    again = lw.methods.method_from(name, **settings).plan(model, data)
    # backward passes of attention add up in any order there: scores agree to rounding, not to the bit
    layers = lw.structure_of(model).layers
    assert again.achieved_sparsity(layers) == pytest.approx(plan.achieved_sparsity(layers), abs=1e-6)
    for layer, way in plan.layers.items():
        if way.prune:
            assert again.layers[layer].prune.sparsity == pytest.approx(way.prune.sparsity, abs=0.02)


def test_the_device_for_one_block_at_a_time_gives_what_the_whole_model_there_gives(data):
    whole, blocks = demo(), demo("cpu")
    plan = lw.methods.Uniform(sparsity=0.5).plan(whole)
    lw.compress(whole, plan, solver=lw.solvers.Wanda(), data=data)
    lw.compress(blocks, plan, solver=lw.solvers.Wanda(), data=data, settings=lw.Settings(device=torch.device("cuda")))
    for name, value in blocks.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, whole.state_dict()[name].cpu())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_is_compressed_on_the_device(name):
    if name in ("dit", "flux", "sd3"):
        pytest.importorskip("diffusers")
    model = MODELS[name]()
    batches = lw.Batches((inputs_for(name, model),), {})
    model = model.cuda()
    plan = lw.methods.Uniform(sparsity=0.5).plan(model)
    result = lw.compress(model, plan, solver=lw.solvers.SparseGPT(), data=batches)
    assert abs(result.sparsity - 0.5) < 0.01


def test_auto_and_evaluation_run_on_the_device(data):
    model = demo()
    plan = lw.methods.Auto(sparsity=0.6, only="owl").plan(model, data)
    lw.compress(model, plan, solver=lw.solvers.Wanda(), data=data)
    found = lw.evaluate(model, data, against=demo())
    assert found.perplexity < 200


@pytest.mark.parametrize("mode", ["per-token", "kivi"])
def test_the_cache_generates_on_the_device(mode, data):
    model = demo(dtype=torch.bfloat16)
    ids = next(iter(data))["input_ids"][:, :48].cuda()
    plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=8, do_sample=False)
    cache = lw.QuantizedKVCache.uniform(8, 8, model.config, mode=mode)
    ours = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert ours.shape == plain.shape
    assert cache.nbytes > 0


def test_kvtuner_plans_on_the_device(data):
    pytest.importorskip("optuna")
    model = demo()
    plan = lw.methods.KVTuner(bits=4, trials=4, prompts=2).plan(model, data)
    assert any(way.cache for way in plan.layers.values())
