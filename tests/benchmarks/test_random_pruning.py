"""random_pruning.py: its measures by hand, and the program end to end on a toy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import layerwise as lw

SCRIPT = Path(__file__).parents[2] / "benchmarks/random_pruning.py"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def test_calibration_error_by_hand():
    """Two bins: two images at 0.9, one right (off by 0.4); two at 0.6, both right (off by 0.4)."""
    from resnet20 import calibration_error

    said = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(said, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)
    assert calibration_error(said[:2], torch.tensor([0, 0])) == pytest.approx(0.1)
    assert calibration_error(torch.tensor([[1.0, 0.0]] * 3), torch.zeros(3).long()) == 0
    both = torch.tensor(
        [[0.55, 0.45], [0.95, 0.05]]
    )  # in one bin of two their errors cancel: mean 0.75, half right ... 0.25
    assert calibration_error(both, torch.tensor([0, 1]), bins=2) == pytest.approx(0.25)


def test_auroc_by_hand():
    """Of 3 x 2 pairs: 0.9 is above both, 0.5 above one and level with the other, 0.1 above none: 3.5 of 6."""
    from resnet20 import auroc

    inside, outside = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0.3, 0.5])
    assert auroc(inside, outside) == pytest.approx(3.5 / 6)
    assert auroc(outside, inside) == pytest.approx(2.5 / 6)
    assert auroc(inside, torch.zeros(4)) == 1
    assert auroc(torch.ones(3), torch.ones(7)) == 0.5


def test_the_network_is_resnet20_and_its_operations_are_counted():
    from resnet20 import ResNet20, multiply_adds

    model = ResNet20(16)
    structure = lw.structure_of(model, include=["*"])
    assert sum(layer.size for layer in structure) == 270_896
    keep = {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in structure}
    image = torch.zeros(1, 3, 32, 32)
    stage = (
        2 * 3 * 9 * 16 * 16 * 32 * 32
    )  # six convolutions of the first stage; the others cost as much, but for what they take in
    halves = [
        (5 + 1 / 2) / 6 + 1 / (2 * 9 * 6)
    ] * 2  # of the second and third: one convolution sees half the width; the 1x1 shortcut
    expected = 27 * 16 * 32 * 32 + stage * (1 + sum(halves)) + 640
    assert multiply_adds(model, image, keep) == expected
    keep["fc"][:] = False
    keep["conv"][:8] = False
    assert multiply_adds(model, image, keep) == expected - 640 - 27 * 8 * 32 * 32


def test_augmented_images_are_crops_of_the_padded_one_or_of_its_mirror():
    from resnet20 import augmented

    image = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16)
    padded = torch.nn.functional.pad(image, [2] * 4, mode="reflect")[0]
    crops = [padded[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    draw, flips = torch.Generator().manual_seed(0), 0
    for one in augmented(image.expand(50, -1, -1, -1), draw):
        plain = any(torch.equal(one, crop) for crop in crops)
        flips += not plain
        assert plain or any(torch.equal(one, crop.flip(-1)) for crop in crops)
    assert 10 < flips < 40


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    (folder / "data").mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("cifar10-train-20k", 300), ("cifar10-test-a", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (draw.integers(0, 128, (count, 32, 32, 3)) + labels[:, None, None, None] * 12).astype(np.uint8)
        np.savez(folder / "data" / f"{name}.npz", images=images, labels=labels)
    digits = draw.integers(0, 256, (40, 28, 28)).astype(np.uint8)
    np.savez(folder / "data/mnist-test.npz", images=digits, labels=np.zeros(40, np.uint8))
    return folder


def run(toy, out, *more):
    settings = "--epochs 1 --images 300 --test-images 40 --pixels 16 --threads 1 --widths 2,4 --sparsities 0.9".split()
    command = [sys.executable, str(SCRIPT), "--bed", str(toy), *settings, "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_runs_and_goes_on_where_it_was(toy, tmp_path):
    out = tmp_path / "table.md"
    first = run(toy, out, "--seeds", "1", "--ratios", "erk")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("\n") == 4  # two widths, dense and erk
    second = run(toy, out, "--seeds", "1", "--ratios", "erk,snip-ratio")
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("\n") == 2
    found = json.loads(out.with_suffix(".json").read_text())
    assert [(row["width"], row["ratio"]) for row in found["rows"]] == [
        (width, ratio) for width in (2, 4) for ratio in ("dense", "erk", "snip-ratio")
    ]
    for row in found["rows"]:
        kept = round((1 - row["sparsity"]) * row["weights"])
        assert abs(row["density"] * row["weights"] - kept) <= 1
        assert 0 <= row["accuracy"] <= 1
        assert row["lowest"] <= row["density"] <= row["highest"]
    dense, erk, _ = found["rows"][:3]
    assert erk["multiply_adds"] < dense["multiply_adds"]
    table = out.read_text()
    assert "| erk | 90% |" in table
    assert "6 networks" in table
