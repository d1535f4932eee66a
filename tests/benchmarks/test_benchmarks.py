"""The benchmarks run: their own arithmetic by hand, and each side's program end to end on a toy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise import Batches, structure_of
from layerwise.scores import zeroth_order_gradient
from models import MODELS, inputs_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_packed_weights_decode_by_hand():
    from bed import _decoded

    stored = {
        "a.q4": torch.full((1, 16), 0x21, dtype=torch.uint8),  # two a byte, the low half first: 1, 2, 1, 2 ...
        "a.scale": torch.tensor([[0.5]], dtype=torch.float16),
        "a.min": torch.tensor([[-1.0]], dtype=torch.float16),
        "b.q8": torch.full((1, 32), -3, dtype=torch.int8),
        "b.scale": torch.tensor([[0.25]], dtype=torch.float16),
        "c": torch.ones(2),
    }
    decoded = _decoded(stored)
    assert set(decoded) == {"a", "b", "c"}
    assert decoded["a"].tolist() == [[-0.5, 0.0] * 16]
    assert decoded["b"].tolist() == [[-0.75] * 32]


def test_zeros_are_counted_in_blocks_and_elsewhere():
    from bed import block_zeros

    weights = {
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[0.0, 1.0], [0.0, 2.0]]),
        "model.layers.0.norm.weight": torch.tensor([0.0, 1.0]),
        "lm_head.weight": torch.tensor([[0.0, 0.0]]),
    }
    assert block_zeros(weights) == (2, 4, 3)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
    from bed import perplexity

    model = MODELS["llama"]()
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = [torch.arange(5), torch.arange(3)]
    assert perplexity(model, windows) == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_mean_and_deviation_of_cells():
    from allocation import mean_deviation

    assert mean_deviation([{"perplexity": 10.0}, {"perplexity": 12.0}]) == "11.00 ± 1.41"
    assert mean_deviation([{"perplexity": 1234.5}]) == "1234"
    assert mean_deviation([{"perplexity": 10.0}, {"error": "BudgetError: no"}]) == "failed"


def test_results_go_on_after_a_line_cut_short(tmp_path):
    from lines import Lines

    file = tmp_path / "cells.jsonl"
    first, second = {"model": "m", "seed": 0, "protocol": {"weights": "a"}}, {"model": "m", "seed": 1, "protocol": {}}
    Lines(file).add(first, {"perplexity": 3.0})
    file.write_text(file.read_text() + '{"key": {"model": "m", "spar')
    Lines(file).add(second, {"perplexity": 5.0})
    again = Lines(file)
    assert first in again
    assert {**first, "protocol": {"weights": "b"}} not in again
    assert again[second] == {"perplexity": 5.0}
    assert again.of(model="m", seed=1) == again.of(protocol={}) == [{"perplexity": 5.0}]
    assert again.of(model="m") == [{"perplexity": 3.0}, {"perplexity": 5.0}]
    Lines(file).add(first, {"perplexity": 4.0})
    assert Lines(file).of(seed=0) == [{"perplexity": 4.0}]


def test_magnitude_with_a_fixed_allocation_needs_one_seed():
    from allocation import draws

    assert not draws("uniform", "magnitude")
    assert not draws("erk", "magnitude")
    assert draws("random", "magnitude")
    assert draws("owl", "magnitude")
    assert draws("uniform", "wanda")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_our_side_measures_a_run(tmp_path):
    from measuring import Job

    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.arange(32).reshape(4, 8) % model.config.vocab_size}, tmp_path / "ids")
    job = Job(str(tmp_path / "model"), str(tmp_path / "ids"), str(tmp_path / "out"), "sparsegpt-2:4", 0.5, 2, 1)
    done = _run("ours_pruning.py", job.to_json())
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert 0 < measured["forward_seconds"] < 60
    assert 0 <= measured["grown_bytes"] < measured["peak_bytes"]
    assert {"collect", "solve", "propagate", "total"} <= set(measured["own"]["split"])
    weights = load_file(tmp_path / "out")
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert ((up.reshape(len(up), -1, 4) == 0).sum(-1) == 2).all()


def test_the_naive_recipe_is_that_of_the_papers():
    from farms_oracle import peak_alpha, window_eigenvalues
    from naive_farms import Layout, naive

    weight = torch.randn(60, 45, generator=torch.Generator().manual_seed(0))
    values = window_eigenvalues(weight, 24, 1.0, 4)
    found = naive(weight, Layout(24, 4), "peak")
    alpha, cuts = peak_alpha(values, reference=False)
    assert (found.alpha, found.cuts, found.windows) == (pytest.approx(alpha, rel=1e-3), cuts, 16)
    some = naive(weight, Layout(24, 4), "mid", most=4)
    assert (some.measured, some.windows) == (4, 16)


def test_exponents_are_measured_beside_the_recipe(tmp_path):
    out = tmp_path / "farms.md"
    small = ["--models", "", "--sizes", "260x257", "--large", "300x300"]
    done = _run("farms.py", *small, "--work", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [(row["name"], row["fit"]) for row in rows] == [
        (f"{size} {kind}", fit)
        for size in ("260x257", "300x300")
        for kind in ("noise", "heavy")
        for fit in ("mid", "peak")
    ]
    assert all(row["exact_error"] < 1e-3 for row in rows if row["fit"] == "mid")
    assert rows[0]["windows"] == rows[0]["measured"] == 10
    assert "| 260x257 noise | mid | 10 |" in out.read_text()


def test_scale_runs_as_a_toy_and_refuses_full_size_without_cuda():
    done = _run("scale_gpu.py", "--toy", "--methods", "wanda")
    assert done.returncode == 0, done.stderr
    assert "| wanda |" in done.stdout
    assert "50.0000%" in done.stdout
    if not torch.cuda.is_available():
        refused = _run("scale_gpu.py")
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert "--toy" in refused.stderr


def test_rank_correlation_by_hand():
    from ecoflap import spearman

    a = {"w": 1.0, "x": 2.0, "y": 3.0, "z": 4.0}
    assert spearman(a, {name: value**3 for name, value in a.items()}) == pytest.approx(1)
    assert spearman(a, {name: -value for name, value in a.items()}) == pytest.approx(-1)
    assert spearman(a, {"w": 10.0, "x": 30.0, "y": 20.0, "z": 40.0}) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_naive_and_paused_evaluations_measure_the_same():
    from ecoflap import STEP, naive

    model = MODELS["llama"]()
    data, structure = Batches((inputs_for("llama", model),), {}), structure_of(model, include=["*.down_proj"])
    expected = naive(model, data, structure)
    assert zeroth_order_gradient(model, data, structure, step=STEP, tail="exact") == pytest.approx(expected, rel=1e-2)


def test_every_order_has_the_bits_of_its_column(tmp_path, monkeypatch):
    """The cells of a toy, their budgets, and the table they fill."""
    import argparse

    import layerwise.solvers as solvers
    import layerwise_bits
    from bed import Subject
    from lines import Lines
    from rounding import Rounding
    from tiny import tiny_llama

    monkeypatch.setitem(solvers.SOLVERS, "rounding", Rounding)
    options = argparse.Namespace(
        solvers="rounding", high=4, group=16, points=3, draws=2, measured="errors,divergence", probes=1, samples=2, length=16, tokens=64,
        dtype="float32", threads=1, device="cpu",
    )  # fmt: skip
    subject = Subject("toy", tiny_llama(tmp_path / "model", blocks=4), tmp_path)
    ids = torch.randint(2, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Subject, "calibration", lambda *_: ids)
    bench = layerwise_bits.Bench(subject, options)
    cells = list(bench.cells())
    assert bench.points() == [0, 2, 4]
    assert [cell.low for cell in cells if cell.order == "random"] == [2, 2]
    assert {cell.order for cell in cells if cell.low == 0} == {"dense", "lim"}
    true = {cell: bench.plan(cell).budget.achieved_bits for cell in cells if cell.order != "dense"}
    half = bench.budget("rounding", 2)
    assert half == pytest.approx((bench.budget("rounding", 0) + bench.budget("rounding", 4)) / 2)
    for cell, bits in true.items():
        if cell.order in layerwise_bits.ORDERS:
            assert bits == pytest.approx(bench.budget(cell.solver, cell.low))
        else:
            assert bench.budget(cell.solver, cell.low) - 0.3 < bits <= bench.budget(cell.solver, cell.low) + 1e-9
    results = Lines(tmp_path / "cells.jsonl")
    for number, cell in enumerate(cells):
        results.add(bench.key(cell), {"bits": true.get(cell, 32.0), "perplexity": 10.0 + number})
    text = "\n".join(layerwise_bits.report(results, {"toy": bench}, options))
    assert "| blocks at 2 bits | 0 | 2 | 4 |" in text
    assert "| random | 11.00 | 15.50 ± 0.71 | " in text
    assert "true bits of 3 everywhere: uniform 3: " in text
    assert "errors, layers, 3 bits too: " in text
