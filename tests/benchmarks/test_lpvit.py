"""lpvit.py on a toy: the bed's layout loads, every way runs, and a second run goes on where the first was."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

SCRIPT = Path(__file__).parents[2] / "benchmarks/lpvit.py"


def stored_vit(draw):
    """The bed's names: around torch's own encoder."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 8, 256, batch_first=True), 6)
    tensors = {f"transformer.{name}": torch.zeros_like(value) for name, value in encoder.state_dict().items()}
    tensors |= {
        "patch_embed.proj.weight": torch.zeros(128, 3, 4, 4),
        "patch_embed.proj.bias": torch.zeros(128),
        "cls_token": torch.zeros(1, 1, 128),
        "pos_embed": torch.zeros(1, 65, 128),
        "mlp_head.0.weight": torch.zeros(128),
        "mlp_head.0.bias": torch.zeros(128),
        "mlp_head.1.weight": torch.zeros(10, 128),
        "mlp_head.1.bias": torch.zeros(10),
    }
    return {name: torch.randn(value.shape, generator=draw) * 0.1 for name, value in tensors.items()}, encoder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    (folder / "data").mkdir()
    (folder / "vision").mkdir()
    tensors, _ = stored_vit(torch.Generator().manual_seed(0))
    save_file(tensors, folder / "vision/cifar10-vit-post-norm.safetensors")
    draw = np.random.default_rng(0)
    for name, count in (("train-20k", 40), ("test-a", 20)):
        pixels = draw.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        np.savez(
            folder / "data" / f"cifar10-{name}.npz", images=pixels, labels=(np.arange(count) % 10).astype(np.uint8)
        )
    return folder


def test_the_renamed_model_is_the_stored_one(toy, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from vit_cifar import cifar, load_vit

    tensors, encoder = stored_vit(torch.Generator().manual_seed(0))
    part = "transformer."
    encoder.load_state_dict({name.removeprefix(part): v for name, v in tensors.items() if name.startswith(part)})
    batch = cifar(toy, "test-a", 0, 4)[0]
    x = nn.functional.conv2d(
        batch["pixel_values"], tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], 4
    )
    x = torch.cat([tensors["cls_token"].expand(4, -1, -1), x.flatten(2).transpose(1, 2)], 1) + tensors["pos_embed"]
    x = encoder.eval()(x)[:, 0]
    x = nn.functional.layer_norm(x, (128,), tensors["mlp_head.0.weight"], tensors["mlp_head.0.bias"])
    expected = nn.functional.linear(x, tensors["mlp_head.1.weight"], tensors["mlp_head.1.bias"])
    torch.testing.assert_close(load_vit(toy)(batch["pixel_values"]), expected, rtol=1e-3, atol=1e-4)


def run(toy, out, ways):
    options = f"--blocks 32 --densities 0.5 --images 10 --calibration 8 --tune 4 --no-speed --ways {ways}"
    command = [sys.executable, str(SCRIPT), "--bed", str(toy), "--out", str(out), *options.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_way_runs_and_a_second_run_goes_on(toy, tmp_path):
    out = tmp_path / "table.md"
    first = run(toy, out, "uniform,lpvit")
    assert first.returncode == 0, first.stderr
    second = run(toy, out, "uniform,lpvit,flat,greedy,lpvit-sparsegpt")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("'way'") == 3
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    rows = {line["key"]["way"]: line["row"] for line in lines}
    for way in ("uniform", "lpvit", "flat", "greedy", "lpvit-sparsegpt"):
        assert rows[way]["macs"] == pytest.approx(0.5, abs=0.01)
        assert rows[way]["macs"] < rows[way]["energy"] < 1
        assert 0 <= rows[way]["before"] <= 1
        assert (rows[way]["after"] is None) == (way in ("flat", "greedy"))
    assert out.read_text().count("| 50.0% | 32 |") >= 4
