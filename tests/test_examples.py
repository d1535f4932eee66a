"""Every example runs: those that need a language model on the one inside the package, the others on their own."""

import importlib.util
import itertools
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from layerwise.io.places import model_folder
from layerwise.plan import Plan
from layerwise.structure import structure_of
from models import small_llama

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEMO = Path(__file__).resolve().parents[1] / "src" / "layerwise" / "demo_model" / "config.json"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not in the package yet")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.5, 0.97])
def test_my_method_meets_the_budget_and_rises_with_depth(sparsity: float):
    model = small_llama(num_hidden_layers=5)
    structure = structure_of(model)
    plan = example("my_method").Ramp(sparsity=sparsity).plan(model)
    plan.check(structure.layers)
    total = sum(layer.size for layer in structure.layers)
    assert sum(plan.zeros(structure.layers).values()) == round(sparsity * total)
    zeros = plan.zeros(structure.layers)
    by_block = [
        sum(zeros.get(layer.name, 0) for layer in block.layers) / sum(layer.size for layer in block.layers)
        for block in structure.blocks
    ]
    assert all(early <= late + 1e-3 for early, late in itertools.pairwise(by_block))
    assert Plan.from_text(plan.to_yaml()) == plan  # the settings are plain values


def test_my_method_worked_by_hand():
    """Two blocks of equal size: the first has score 1, the second 0, so they lie `spread` below and above the mean."""
    structure = structure_of(small_llama(num_hidden_layers=2))
    plan = (
        example("my_method").Ramp(sparsity=0.5, spread=0.1).plan(small_llama(num_hidden_layers=2), structure=structure)
    )
    for block, sparsity in zip(structure.blocks, (0.4, 0.6), strict=True):
        for layer in block.layers:
            prune = plan.layers[layer.name].prune
            assert prune
            assert prune.sparsity == pytest.approx(sparsity, abs=1 / layer.size)


def test_my_method_runs_as_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small_llama(num_hidden_layers=3).save_pretrained(tmp_path)
    example("my_method").main(str(tmp_path), "0.25")
    assert "25.0000% of the pruned layers" in capsys.readouterr().out


def test_own_data_looking_at_inputs_helps():
    errors = example("own_data").main()
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_train_sparse_learns_with_a_tenth_of_the_weights(capsys: pytest.CaptureFixture[str]):
    accuracy, weights = example("train_sparse").main()
    assert weights == 507  # of 144 + 4608 + 320
    assert accuracy > 0.85
    assert "507 of 5072 weights (10.0%)" in capsys.readouterr().out


@needs_demo
def test_packed_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("compressed_tensors")
    example("packed_codes").main(tmp_path / "out")
    out = capsys.readouterr().out
    assert "56 layers, 24 of 4 bits, 32 of 8 bits" in out
    assert "75 tensors equal bit for bit" in out
    assert "difference of logits: 0\n" in out


@needs_demo
def test_armor_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cost = example("armor_factors").main(tmp_path / "out")
    out = capsys.readouterr().out
    assert "56 layers in 10.50 bits per weight" in out
    assert "Loads with layerwise.load: 243 tensors equal bit for bit" in out
    assert cost.dense_perplexity < cost.perplexity < 3 * cost.dense_perplexity


@needs_demo
def test_compress_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert model_folder("demo") == DEMO.parent
    cost = example("compress_in_python").main(str(tmp_path / "out"), length=128)
    out = capsys.readouterr().out
    assert "60.0000% of the pruned layers" in out
    assert "loaded back from out" in out
    assert 0 < cost.kl < math.inf
    assert cost.perplexity > cost.dense_perplexity
    assert Plan.load(tmp_path / "out" / "plan.yaml").method["name"] == "owl"


@needs_demo
def test_edit_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edited = example("edit_a_plan").main(str(tmp_path))
    assert "60.0000% zeros" in capsys.readouterr().out
    assert Plan.load(tmp_path / "edited.yaml") == edited
    gentle = {name for name, t in edited.layers.items() if t.prune and t.prune.sparsity == 0.3}
    assert gentle
    assert all(name.endswith(("down_proj", "v_proj")) for name in gentle)


@needs_demo
def test_kv_cache_bits(capsys: pytest.CaptureFixture[str]):
    search = example("kv_cache_bits").main(bits=3.5, trials=14, length=64)
    out = capsys.readouterr().out
    assert search.verdict in out
    assert "true bits   KL" in out
    assert "def read_lines(path):" in out
    assert len(search.plan.layers) == 8


def test_block_vit_wins_back_what_blocks_cost(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = example("block_vit").main()
    assert found["dense"] > 0.9
    assert found["tuned"] > found["dense"] - 0.04
    assert found["fastest form"] == pytest.approx(found["tuned"], abs=0.01)
    assert "by the energy model" in capsys.readouterr().out


def test_precrop_cnn_trains_and_loads_what_it_saved(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    found = example("precrop_cnn").main(epochs=4)
    assert found["full"] > 0.9
    assert found["cropped"] > 0.85
    assert found["loaded"] == found["cropped"]
    assert "of 77,328 weights" in capsys.readouterr().out


@needs_demo
def test_what_is_faster(capsys: pytest.CaptureFixture[str]):
    model, fast, report = example("what_is_faster").main(seconds=0.002, lengths=(1,))
    assert len(report.layers) == 57
    assert fast is not model
    shown = capsys.readouterr().out
    assert "1 tokens at once: " in shown
    assert "they write the same: True" in shown


@needs_demo
def test_train_few_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    words = "The old man went down to the sea and the boat was gone . She told him a story about a small bird .".split()
    draw = random.Random(0)  # noqa: S311
    text = tmp_path / "text.txt"
    text.write_text(" ".join(draw.choice(words) for _ in range(9000)), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):  # the Trainer seeds everything it finds
        before, after = example("train_few_blocks").main("demo", str(text), steps=8, length=32)
    assert after < 0.5 * before
    out = capsys.readouterr().out
    assert "model.layers.7: " in out


@needs_demo
def test_recover_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("accelerate")
    found = example("recover_quality").main("demo", steps=4, length=32)
    assert found.after < found.before
    assert "ended since 4 steps" in capsys.readouterr().out


@needs_demo
def test_reconstruct_blocks(capsys: pytest.CaptureFixture[str]):
    plain, tuned = example("reconstruct_blocks").main("demo", samples=8, length=32)
    assert tuned < plain
    assert "held-out perplexity" in capsys.readouterr().out


@needs_demo
def test_adapter_recovery(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("peft")
    before, after = example("adapter_recovery").main("demo", samples=8, length=32)
    assert before == after
    assert "numbers trained" in capsys.readouterr().out
