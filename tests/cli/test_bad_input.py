"""Every bad input: one line on standard error, the exit code as designed, nothing half written."""

import errno
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.cli import main
from layerwise.engine import Work
from layerwise.engine import work as engine_work
from layerwise.io import whole
from layerwise.plan import Plan, Prune
from layerwise.solvers import Wanda
from tiny import tiny_llama

COMPRESS = "compress model -o out --data text.txt --samples 4 --length 32".split()


def errors(err):
    """What is on standard error besides the remark that a walk begins with."""
    return [line for line in err.splitlines() if not line.startswith("Waiting activations:")]


def refused(capsys, here: Path, args: list[str], code: int, *words: str) -> None:
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    capsys.readouterr()
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert len(errors(err)) == 1, err
    assert errors(err)[0].startswith("layerwise: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before


def rewrite(here: Path, change) -> None:
    file = here / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_path_that_is_not_there(here, capsys):
    refused(capsys, here, ["compress", "./nowhere", *COMPRESS[2:]], 2, "./nowhere", "no such folder")


def test_a_folder_without_config(here, capsys):
    (here / "model" / "config.json").unlink()
    refused(capsys, here, COMPRESS, 2, "config.json")


@pytest.mark.parametrize(
    "command", [COMPRESS, ["inspect", "model"], ["plan", "model"], ["evaluate", "model", "--data", "text.txt"]]
)
def test_truncated_weights(here, capsys, command):
    file = here / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(capsys, here, command, 2, "model.safetensors", "truncated")


def test_corrupt_weights(here, capsys):
    file = here / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" * 64 + file.read_bytes()[72:])
    refused(capsys, here, COMPRESS, 2, "model.safetensors", "corrupt")


def test_nan_in_the_weights(here, capsys):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")

    rewrite(here, spoil)
    refused(capsys, here, COMPRESS, 2, "model.layers.1.mlp.up_proj.weight", "1 of ")


def test_nan_in_the_activations_names_the_layer(here, capsys):
    def spoil(tensors):  # finite weights whose product is not
        tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e30)
        tensors["model.layers.0.mlp.gate_proj.weight"].fill_(1e30)

    rewrite(here, spoil)
    refused(capsys, here, COMPRESS, 1, "model.layers.0.mlp.down_proj", "not finite")


def test_an_empty_data_file(here, capsys):
    (here / "text.txt").write_text("")
    refused(capsys, here, COMPRESS, 2, "text.txt", "no text")


def test_no_such_data_file(here, capsys):
    refused(capsys, here, [*COMPRESS[:4], "--data", "none.txt"], 2, "none.txt", "no such data file")


def test_no_data_at_all(here, capsys):
    refused(capsys, here, COMPRESS[:4], 2, "--data")


def test_text_shorter_than_one_sample(here, capsys):
    (here / "text.txt").write_text("w1 w2 w3")
    refused(capsys, here, COMPRESS, 2, "text.txt", "3 tokens", "4 samples of 32")


def test_a_tokenizer_of_another_vocabulary(here, capsys):
    shutil.rmtree(here / "model")
    tiny_llama(here / "model", vocabulary=20)  # the tokenizer knows 62 tokens
    refused(capsys, here, COMPRESS, 2, "vocabulary of 20", "tokenizer")


@pytest.mark.parametrize("sparsity", ["1.2", "-0.1", "nan"])
def test_a_sparsity_out_of_range(here, capsys, sparsity):
    refused(capsys, here, [*COMPRESS, "--sparsity", sparsity], 2, "sparsity", "0 <= sparsity < 1")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--method", "oul"], ['unknown method "oul"', 'Did you mean "owl"?']),
        (["--solver", "sparsgpt"], ['unknown solver "sparsgpt"', 'Did you mean "sparsegpt"?']),
        (["--method", "owl", "--set", "sprad=0.1"], ['no setting "sprad"', 'Did you mean "spread"?']),
        (["--method", "owl", "--set", "spread"], ['"spread"', "NAME=VALUE"]),
        (["--method", "owl", "--set", "spread=wide"], ["spread='wide'", "number"]),
        (["--method", "owl", "--pattern", "2:4"], ["owl", "--pattern"]),
        (["--solver-set", "dampp=1", "--solver", "sparsegpt"], ['"dampp"', 'Did you mean "damp"?']),
        (["--exclude", "*.nothing"], ['"*.nothing"', "matches no weight"]),
        (["--exclude", "*"], ["no layers are left"]),
        (["--device", "cuda:9"], ['"cuda:9"']),
        (["--device", "toaster"], ['"toaster"']),
        (["--dtype", "float12"], ['"float12"']),
        (["--propagate", "sideways"], ['"sideways"']),
        (["--length", "9999"], ["--length 9999", "64"]),
        (["--method", "erk", "--sparsity", "0.9", "--max-sparsity", "0.5"], ["0.5"]),
        (["--samples", "x"], ["--samples", "integer"]),
        (["--wat"], ["--wat"]),
    ],
)  # fmt: skip
def test_an_unknown_word_or_a_value_out_of_range(here, capsys, args, words):
    refused(capsys, here, [*COMPRESS, *args], 2, *words)


def test_a_comparison_of_no_seeds(here, capsys):
    refused(capsys, here, "compare model --data text.txt --samples 4 --length 32 --seeds 0".split(), 2, "--seeds", "1")


def test_no_command_shows_the_help_and_no_empty_error(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "compress" in out
    assert err == ""


def test_a_plan_on_a_device_that_is_not_there(here, capsys):
    refused(capsys, here, ["plan", "model", "--method", "farms", "--device", "cuda:9"], 2, '"cuda:9"')
    refused(capsys, here, ["plan", "model", "--edit", "plan.yaml", "--device", "cpu"], 2, "--device", "--edit")


def test_an_unknown_command(here, capsys):
    refused(capsys, here, ["comprss", "model"], 2, "comprss")


def test_the_output_exists(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("precious")
    refused(capsys, here, COMPRESS, 2, '"out" exists already', "--force")
    refused(capsys, here, [*COMPRESS, "--force"], 2, '"out"', "not a model folder")  # never someone else's folder
    (here / "plan.yaml").write_text("mine")
    refused(capsys, here, ["plan", "model", "-o", "plan.yaml"], 2, '"plan.yaml" exists already')
    refused(capsys, here, ["compare", "model", "--data", "text.txt", "-o", "table.txt"], 2, ".md or .html")


def test_a_disk_too_small_is_seen_before_work(here, capsys, monkeypatch):
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**9, 10**9, 10))
    refused(capsys, here, COMPRESS, 2, '"out"', "free")


def test_a_disk_that_fills_up_while_saving(here, capsys, monkeypatch):
    def full(model, folder):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["layerwise.io.save"], "write_model", full)
    assert main(COMPRESS) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(errors(err)) == 1
    assert "the disk filled up" in err
    assert not (here / "out").exists()
    assert len(list((here / "out.work" / "blocks").glob("*.json"))) == 3  # hours of work are not thrown away


def test_a_disk_that_fills_up_in_the_first_block(here, capsys, monkeypatch):
    def full(tensors, file, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine_work, "save_file", full)
    refused(capsys, here, COMPRESS, 1, "model.layers.0", "No space left")


def test_a_plan_for_another_model(here, capsys):
    tiny_llama(here / "other", blocks=4)
    assert main(["plan", "other", "-o", "plan.yaml", "-q"]) == 0
    refused(capsys, here, [*COMPRESS, "--plan", "plan.yaml"], 2, 'made for "other"')


def test_a_plan_with_tabs(here, capsys):
    (here / "plan.yaml").write_text("layerwise: 1\nlayers:\n\tmodel.layers.0.mlp.up_proj: {prune: {sparsity: 0.5}}\n")
    refused(capsys, here, [*COMPRESS, "--plan", "plan.yaml"], 2, "plan.yaml", "line 3", "tab")


def test_a_plan_lists_all_its_problems_a_line_each(here, capsys):
    wrong = {"model.layers.0.mlp.up_prj": Prune(sparsity=0.5), "model.layers.9.mlp.up_proj": Prune(sparsity=0.5)}
    Plan(layers=wrong).save(here / "plan.yaml")
    assert main([*COMPRESS, "--plan", "plan.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("layerwise: plan: entry") for line in lines)
    assert "up_proj" in lines[0]  # the nearest name is offered
    assert not (here / "out").exists()
    assert not (here / "out.work").exists()


def test_a_plan_and_a_method_together(here, capsys):
    Plan(layers={"model.layers.0.mlp.up_proj": Prune(sparsity=0.5)}).save(here / "plan.yaml")
    refused(capsys, here, [*COMPRESS, "--plan", "plan.yaml", "--sparsity", "0.5"], 2, "--plan", "--sparsity")


def test_a_work_folder_of_another_run_is_left_alone(here, capsys):
    (here / "out.work" / "blocks").mkdir(parents=True)
    (here / "out.work" / "run.json").write_text(json.dumps({"seed": "7"}))
    (here / "out.work" / "blocks" / "model.layers.0.json").write_text("[]")
    refused(capsys, here, COMPRESS, 2, "another run", "seed: 7 then, 0 now")


def test_a_work_folder_in_use(here, capsys):
    with Work("out.work"):
        refused(capsys, here, COMPRESS, 2, '"out.work"', "another run", "--work")
    assert not (here / "out.work").exists()


def test_a_bad_request_leaves_no_folders_on_the_way_to_the_output(here, capsys):
    args = [word if word != "out" else "new/folder/out" for word in COMPRESS]
    refused(capsys, here, [*args, "--exclude", "*.nothing"], 2, "matches no weight")


def test_an_unexpected_error_is_one_line_and_debug_shows_the_rest(here, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(Wanda, "solve", broken)
    refused(capsys, here, COMPRESS, 1, "unexpected RuntimeError: a bug in two lines", "--debug")
    assert main([*COMPRESS, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_model_that_cannot_take_the_data_is_one_line(here, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not fit\nin two lines")

    monkeypatch.setattr(torch.nn.Linear, "forward", broken)
    refused(
        capsys, here, COMPRESS, 1, "cannot run on batch 0", "RuntimeError: shapes do not fit.", "Check that the data"
    )
