"""`layerwise recover`: what it says and writes, what it refuses, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.cli import main
from tiny import tiny_llama, tiny_text

SHORT = "--steps 6 --length 32 --batch 2 --lr 0.003 --data text.txt".split()


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def pruned(here, same_process, capsys):
    """A folder `pruned`, half of whose weights in the blocks are zero."""
    assert (
        main(["compress", "model", *"--data text.txt --samples 4 --length 32 --sparsity 0.5 -o pruned -q".split()]) == 0
    )
    capsys.readouterr()
    return here


def test_it_is_nearer_the_teacher_and_the_zeros_stay(pruned, capsys):
    pytest.importorskip("matplotlib")
    assert main(["recover", "pruned", "--teacher", "model", *SHORT, "--plot", "losses.png"]) == 0
    out, _ = capsys.readouterr()
    for word in ("dense", "before", "after", "held-out loss", "step 0", "6 steps in", "trained on: text.txt"):
        assert word in out
    before, after = weights(pruned / "pruned"), weights(pruned / "pruned-recovered")
    assert any(not value.equal(before[name]) for name, value in after.items())
    zeros = [name for name, value in before.items() if "layers" in name and value.ndim == 2 and not value.all()]
    assert len(zeros) == 21
    for name in zeros:
        assert torch.equal(before[name] == 0, after[name] == 0), name
    record = json.loads((pruned / "pruned-recovered/layerwise.json").read_text())
    assert record["result"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert record["result"]["recovery"]["settings"]["steps"] == 6
    assert record["result"]["recovery"]["teacher"] == "model"
    assert "recovery.after" in (pruned / "pruned-recovered/README.md").read_text()
    assert (pruned / "pruned-recovered/plan.yaml").exists()
    assert (pruned / "losses.png").read_bytes()[:4] == b"\x89PNG"
    assert not (pruned / "pruned-recovered.work").exists()


def test_json_has_the_losses(pruned, capsys):
    assert main(["recover", "pruned", *SHORT, "--json", "-o", "out"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recovery"]["steps"] == 6
    assert found["after"]["perplexity"] <= found["before"]["perplexity"]
    assert found["after"]["zeros"] == found["before"]["zeros"] > 0.2
    assert found["after"]["kl"] is None


def test_held_out_windows_are_not_trained_on(pruned):
    from layerwise.cli.inputs import DataChoice, ModelChoice
    from layerwise.cli.screen import Screen
    from layerwise.cli.training_data import TrainingData

    train, judged = TrainingData(DataChoice("text.txt", 1000, 32, 4), None).read(
        ModelChoice("model"), Screen(quiet=True)
    )
    rows = {tuple(row.tolist()) for batch in train for row in batch["input_ids"]}
    held = {tuple(row.tolist()) for batch in judged for row in batch["input_ids"]}
    assert len(held) == 11  # of 187 windows
    assert len(rows) == 176
    assert not rows & held
    assert train.protocol["samples"] == 176


def one_line(capsys, *words):
    out, err = capsys.readouterr()
    assert not out
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--alpha", "0.3"], ("--alpha: not used", "no --teacher")),
        (["--teacher", "pruned"], ("this is the model that is trained",)),
        (["--teacher", "nowhere"], ("nowhere",)),
        (["--lr", "0"], ("lr=0", "above 0")),
        (["--data", "nothing.txt"], ("nothing.txt: no such data file",)),
        (["-o", "model"], ("exists already", "--force")),
        (["--length", "1000"], ("longest input is 64",)),
        (["--length", "64", "--data", "short.txt"], ("too few to hold some out", "--held-out")),
        (["--rank", "4"], ("--rank: not used", "--adapter")),
        (["--adapter", "lora"], ("give hira, shira or masked-lora",)),
        (["--plot", "picture.jpg"], ("ends in .png",)),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(pruned, capsys, more, words):
    (pruned / "short.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 20, encoding="utf-8")
    before = sorted(path.name for path in pruned.iterdir())
    arguments = [*SHORT, *more] if "--data" not in more else [*SHORT[:-2], *more]
    assert main(["recover", "pruned", *arguments]) == 2
    one_line(capsys, *words)
    assert sorted(path.name for path in pruned.iterdir()) == before


def test_a_teacher_of_another_vocabulary_is_refused(pruned, capsys):
    tiny_llama(pruned / "other", words=50)
    capsys.readouterr()
    assert main(["recover", "pruned", "--teacher", "other", *SHORT]) == 2
    one_line(capsys, 'teacher "other" has another tokenizer')
    assert not (pruned / "pruned-recovered").exists()


def test_a_teacher_whose_vocabulary_is_padded_differently_will_do(pruned, capsys):
    tiny_llama(pruned / "padded", vocabulary=72)
    assert main(["recover", "pruned", "--teacher", "padded", *SHORT, "-q"]) == 0


def test_quantized_models_are_refused(pruned, capsys):
    config = pruned / "pruned/config.json"
    facts = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    config.write_text(json.dumps(facts))
    assert main(["recover", "pruned", *SHORT]) == 2
    one_line(capsys, "is quantized", "adapter")


@pytest.mark.parametrize("kind", ["hira", "shira", "masked-lora"])
def test_an_adapter_is_trained_merged_and_leaves_zeros_zero(pruned, capsys, kind):
    pytest.importorskip("peft")
    asked = ["recover", "pruned", "--teacher", "model", *SHORT, "--adapter", kind, "--rank", "2", "-o", "out"]
    assert main(asked) == 0
    before, after = weights(pruned / "pruned"), weights(pruned / "out")
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved
    assert all("layers" in name and "norm" not in name for name in moved)
    for name in moved:
        assert torch.equal(before[name] == 0, after[name] == 0), name
    record = json.loads((pruned / "out/layerwise.json").read_text())["result"]["recovery"]
    assert record["adapter"] == {"kind": kind, "rank": 2}
    assert record["settings"]["lr"] == 0.003


def test_the_adapter_of_a_quantized_model_is_saved_apart(pruned, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("compressed_tensors")
    from layerwise.io import load
    from layerwise.recover import load_adapter

    quantize = "--method uniform-bits --bits 4 --solver round_to_nearest --set group=16 -o q -q".split()
    assert main(["compress", "model", *quantize]) == 0
    capsys.readouterr()
    stored = weights(pruned / "q")
    assert main(["recover", "q", "--teacher", "model", *SHORT, "--adapter", "hira", "--rank", "2", "-o", "out"]) == 0
    assert "The adapter alone, for q: merged weights would leave its grid." in capsys.readouterr().out
    assert all(value.equal(stored[name]) for name, value in weights(pruned / "q").items())
    assert json.loads((pruned / "out/recovery.json").read_text())["recovery"]["adapter"] == {"kind": "hira", "rank": 2}
    plain, tuned = load("q", dtype="float32"), load_adapter(load("q", dtype="float32"), "out")
    ids = torch.arange(2, 30)[None]
    assert not torch.equal(plain(input_ids=ids).logits, tuned(input_ids=ids).logits)


def test_a_dense_model_says_that_no_masks_are_held(here, same_process, capsys):
    assert main(["recover", "model", *SHORT]) == 0
    assert "no matrix has zeros" in capsys.readouterr().err


def test_half_precision_weights_are_trained_in_float32_and_saved_as_they_were(pruned):
    file = pruned / "pruned/model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    config = pruned / "pruned/config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    assert main(["recover", "pruned", *SHORT, "-q"]) == 0
    before, after = weights(pruned / "pruned"), weights(pruned / "pruned-recovered")
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        assert not value[before[name] == 0].any()


def test_factors_are_trained_and_saved_as_factors(here, same_process, capsys):
    arguments = "--data text.txt --samples 4 --length 32 --solver armor --pattern 2:4 --set block=8 -o armor -q"
    assert main(["compress", "model", *arguments.split()]) == 0
    assert main(["recover", "armor", "--teacher", "model", *SHORT, "-q"]) == 0
    record = json.loads((here / "armor-recovered/layerwise.json").read_text())
    assert record["saved"]["factored"]


def test_images(here, same_process, capsys):
    pytest.importorskip("sklearn")
    import transformers

    from models import VISION

    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**VISION, "num_labels": 10}))
    model.save_pretrained(here / "vit")
    (here / "vit/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    code = main(["recover", "vit", "--data", "digits", "--steps", "2", "--batch", "16"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "accuracy" in out


@pytest.mark.slow
def test_killed_for_real_it_goes_on_to_the_same_bits(tmp_path):
    tiny_llama(tmp_path / "model", blocks=6)
    tiny_text(tmp_path / "text.txt")
    command = [sys.executable, "-m", "layerwise", "recover", "model", *SHORT, "--steps", "150", "-o", "out"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out.work/checkpoint-*/recovery.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "gone on from step" in again.stdout
    once = subprocess.run([*command[:-1], "once"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert once.returncode == 0
    expected = weights(tmp_path / "once")
    assert all(tensor.equal(expected[name]) for name, tensor in weights(tmp_path / "out").items())
