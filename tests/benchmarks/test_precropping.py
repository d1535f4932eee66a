"""precropping.py: equal widths that fill the budget, and the program end to end on a toy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from layerwise.structure import cnn_channels

SCRIPT = Path(__file__).parents[2] / "benchmarks/precropping.py"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_equal_widths_fill_the_budget(share):
    from precropping import evenly
    from resnet20 import ResNet20

    channels = cnn_channels(ResNet20(16), (3, 32, 32))
    widths = evenly(channels, share)
    assert share - 0.002 < channels.multiply_adds(widths) / channels.multiply_adds({}) <= share
    ratios = [widths[name] / full for name, full in channels.widths.items()]
    assert max(ratios) - min(ratios) <= 1 / 16 + 1e-9


def test_it_runs_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("cifar10-train-20k", 64), ("cifar10-test-a", 16)):
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"data/{name}.npz", images=images, labels=np.arange(count, dtype=np.uint8) % 10)
    out = tmp_path / "table.md"
    command = [
        sys.executable,
        str(SCRIPT),
        "--bed",
        str(tmp_path),
        "--out",
        str(out),
        "--models",
        "resnet20",
        "--shares",
        "0.5",
    ]
    command += "--epochs 1 --images 64 --test-images 16 --pixels 16 --threads 1 --width 4 --batch 32".split()
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["key"]["form"] for row in rows] == ["dense", "precrop", "precrop-both", "uniform", "synflow"]
    for row in rows:
        found = row["row"]
        assert found["multiply_adds"] <= row["key"]["share"] * found["of_multiply_adds"]
        assert 0 <= found["accuracy"] <= 1
    second = subprocess.run([*command, "--report"], capture_output=True, text=True, check=False)
    assert second.stdout.startswith("# Widths before training")
    assert second.stdout.count("\n| 50% |") == 4
