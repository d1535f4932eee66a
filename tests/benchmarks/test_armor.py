"""The benchmarks of ARMOR: their arithmetic by hand, and both scripts end to end on a toy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwise.methods import Uniform
from layerwise.structure import structure_of
from models import small_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_blocks_at_both_ends_stay_dense_within_the_bits():
    from armor import bits_of, blocks_dense

    model = small_llama(num_hidden_layers=4)
    structure = structure_of(model)
    half = Uniform(pattern="2:4").plan(model)
    assert bits_of(half, structure) == 9
    for bits, left in ((10.75, [1, 2, 3]), (12.6, [1, 2]), (14.3, [2])):
        plan = blocks_dense(half, structure, bits)
        assert bits_of(plan, structure) == 16 - 7 * len(left) / 4 <= bits
        assert sorted({int(name.split(".")[2]) for name in plan.layers}) == left


def test_the_time_to_the_published_loss_by_hand():
    from armor import trace_table

    rows = [
        {"trace": "o", "form": "default", "block": 8, "points": [(0.0, 1.0), (0.5, 0.4), (1.0, 0.2)]},
        {"trace": "o", "form": "published", "block": 8, "points": [(0.0, 1.0), (2.0, 0.5), (5.0, 0.45), (6.0, 0.46)]},
        {"trace": "o", "form": "faster", "block": 8, "points": [(0.0, 1.0), (3.0, 0.1)]},
    ]
    lines = list(trace_table(rows))[2:]
    assert lines[1] == "| o (8) | published | 3 | 6.0 | 1.0000 | 0.4500 | 0.50 | 10 |"
    assert lines[2].endswith("| 0.1000 | not reached | - |")


@pytest.mark.slow
def test_the_benchmark_runs_on_a_toy_and_goes_on_where_it_was(tmp_path):
    words = ["--toy", "--models", "demo", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "armor")]
    command = [sys.executable, str(BENCHMARKS / "armor.py"), *words]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "armor.jsonl").read_text().splitlines()]
    known = {row["name"]: row for row in rows if "name" in row}
    assert known["armor b<=8"]["bits"] > known["nowag 2:4"]["bits"] == 9
    assert known["armor b<=8"]["losses"][1] < known["armor b<=8"]["losses"][0]
    table = (tmp_path / "armor.md").read_text()
    assert "published form, as long" in table
    again = subprocess.run(command, check=True, capture_output=True)
    assert again.stdout == b""
    assert len((tmp_path / "armor.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its table is another one with CUDA")
def test_the_gpu_script_runs_as_a_toy(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "armor_gpu.py"),
        "--toy",
        "--iterations",
        "2",
        "--out",
        str(tmp_path / "gpu.md"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("no semi-structured kernels on cpu") == 9
    assert "| q | 128 x 128 |" in table
