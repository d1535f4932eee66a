"""Plan, prune, save, go on after a kill: through `main`, with a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from layerwise.cli import main
from layerwise.engine import work as engine_work
from layerwise.passes import spill, waiting
from layerwise.plan import Plan
from tiny import tiny_llama, tiny_text

CHOSEN = "--data text.txt --samples 4 --length 32".split()
COMPRESS = ["compress", "model", *CHOSEN, "--sparsity", "0.5"]


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def zeros(folder):
    return sum(int((one == 0).sum()) for name, one in weights(folder).items() if "layers" in name and one.dim() == 2)


LAYERS = 3 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32)  # weights of q, o, k, v, gate, up, down in three blocks


def test_the_result_is_whole_and_says_what_it_is(here, same_process, capsys):
    assert main([*COMPRESS, "-o", "out", "--method", "owl"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1  # nothing took two seconds
    assert re.fullmatch(r"Waiting activations: about 66\.6 kB in memory \(longest sample 32 tokens\), .* free\.\n", err)
    assert f"{LAYERS // 2:,} of {LAYERS:,}" in out
    assert "Zeros do not shrink this format" in out
    assert zeros(here / "out") == LAYERS // 2
    plan = Plan.load(here / "out" / "plan.yaml")
    assert plan.method["name"] == "owl"
    assert plan.solver["name"] == "wanda"
    assert plan.model.name == "model"
    assert (here / "out" / "tokenizer.json").exists()
    assert not (here / "out.work").exists()
    assert sorted(path.name for path in here.iterdir()) == ["model", "out", "text.txt"]


def test_json_is_all_that_is_on_standard_output(here, same_process, capsys):
    assert main([*COMPRESS, "-o", "out", "--json", "--solver", "sparsegpt"]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert result["result"]["zeros"] == LAYERS // 2
    assert result["saved"]["zeros"] == LAYERS // 2
    assert len(result["result"]["layers"]) == 21
    assert result["plan"]["solver"]["name"] == "sparsegpt"


def test_n_of_m_needs_no_sparsity(here, same_process, capsys):
    assert main(["compress", "model", *CHOSEN, "--pattern", "2:4", "-o", "out", "-q"]) == 0
    gate = weights(here / "out")["model.layers.0.mlp.gate_proj.weight"]
    assert ((gate.reshape(48, 8, 4) != 0).sum(-1) == 2).all()


def test_only_what_was_chosen_changes(here, same_process):
    assert main([*COMPRESS, "-o", "out", "--include", "*.mlp.*", "--exclude", "*.2.*"]) == 0
    before, after = weights(here / "model"), weights(here / "out")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{i}.mlp.{one}_proj.weight" for i in (0, 1) for one in ("gate", "up", "down")}


def test_an_edited_plan_is_applied_with_its_solver(here, same_process, capsys):
    assert main(["plan", "model", "--sparsity", "0.5", "-o", "plan.yaml"]) == 0
    text = (here / "plan.yaml").read_text()
    line = "model.layers.1.mlp.down_proj: {prune: {sparsity: 0.5"
    assert line in text
    (here / "plan.yaml").write_text(text.replace(line, line.replace("0.5", "0.25")))
    capsys.readouterr()
    assert main(["compress", "model", "--plan", "plan.yaml", "-o", "out", "--solver", "magnitude"]) == 2
    assert "budget.sparsity" in capsys.readouterr().err  # the others must make up for it
    assert main("plan model --edit plan.yaml --rebalance --keep *.1.mlp.down_proj -o plan2.yaml".split()) == 0
    assert main("diff plan.yaml plan2.yaml --json".split()) == 0
    changes = json.loads(capsys.readouterr().out.partition("\n[")[2].join(["[", ""]))
    assert "model.layers.1.mlp.down_proj" not in {change["layer"] for change in changes}
    assert main(["compress", "model", "--plan", "plan2.yaml", "-o", "out", "--solver", "magnitude"]) == 0
    assert zeros(here / "out") == LAYERS // 2
    assert int((weights(here / "out")["model.layers.1.mlp.down_proj.weight"] == 0).sum()) == 48 * 32 // 4


def test_force_replaces_and_the_seed_decides(here, same_process, capsys):
    assert main([*COMPRESS, "-o", "out"]) == 0
    first = weights(here / "out")
    assert main([*COMPRESS, "-o", "out", "--force"]) == 0
    assert all(tensor.equal(first[name]) for name, tensor in weights(here / "out").items())
    assert main([*COMPRESS, "-o", "out", "--force", "--seed", "1"]) == 0
    assert not all(tensor.equal(first[name]) for name, tensor in weights(here / "out").items())


def test_streamed_is_the_same_as_whole(here, same_process, capsys):
    assert main([*COMPRESS, "-o", "whole"]) == 0
    assert main([*COMPRESS, "-o", "streamed", "--stream"]) == 0
    whole, streamed = weights(here / "whole"), weights(here / "streamed")
    assert whole.keys() == streamed.keys()
    assert all(tensor.equal(streamed[name]) for name, tensor in whole.items())
    assert Plan.load(here / "streamed" / "plan.yaml") == Plan.load(here / "whole" / "plan.yaml")
    assert len(list((here / "streamed").glob("*.safetensors"))) == 4
    assert not (here / "streamed.work").exists()


def test_in_files_it_is_the_same_and_the_files_are_gone(here, same_process, capsys, monkeypatch):
    assert main([*COMPRESS, "-o", "plain", "--method", "owl"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(spill, "LEAST", 1)
    assert main([*COMPRESS, "-o", "out", "--method", "owl", "--spill", "scratch/a"]) == 0
    assert re.search(r"^Waiting activations: about 66\.6 kB in scratch/a \(", capsys.readouterr().err, re.M)
    plain = weights(here / "plain")
    assert all(tensor.equal(plain[name]) for name, tensor in weights(here / "out").items())
    assert not (here / "scratch").exists()


def test_what_may_not_fit_says_what_to_do(here, same_process, capsys, monkeypatch):
    monkeypatch.setattr(waiting, "available_memory", lambda device: 1000)
    assert main([*COMPRESS, "-o", "out"]) == 0
    err = capsys.readouterr().err
    assert (
        "1.0 kB free: it may not fit. Give smaller --samples or --length, or let them wait in files (--spill FOLDER)."
        in err
    )


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(here, same_process, capsys, monkeypatch, stop, stream):
    assert main([*COMPRESS, "-o", "once", *stream]) == 0
    write = engine_work.Work.write

    def write_one(self, block, tensors, events, tuned=None):
        if block.endswith(".1"):
            raise stop
        write(self, block, tensors, events, tuned)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(engine_work.Work, "write", write_one)
        assert main([*COMPRESS, "-o", "out", *stream]) == (130 if stop is KeyboardInterrupt else 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["Waiting activations", "layerwise"]
    if stop is KeyboardInterrupt:
        assert "Blocks finished in out.work: 1. Run the same command again" in err
    assert not (here / "out").exists()
    assert main([*COMPRESS, "-o", "out", *stream]) == 0
    assert "Going on from out.work: 1 of 3 blocks finished before." in capsys.readouterr().err
    assert not (here / "out.work").exists()
    once = weights(here / "once")
    assert all(tensor.equal(once[name]) for name, tensor in weights(here / "out").items())


@pytest.mark.slow
def test_killed_for_real_it_goes_on_to_the_same_bits(tmp_path):
    tiny_llama(tmp_path / "model", blocks=24)
    tiny_text(tmp_path / "text.txt")
    command = [sys.executable, "-m", "layerwise", *COMPRESS, "-o", "out"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out.work/blocks/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = len(list(tmp_path.glob("out.work/blocks/*.json")))
    assert 0 < done < 24
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"Going on from out.work: {done} of 24" in again.stderr
    assert "logits" in again.stdout  # loaded back in a fresh process
    once = subprocess.run([*command[:-1], "once"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert once.returncode == 0
    expected = weights(tmp_path / "once")
    assert all(tensor.equal(expected[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.slow
def test_two_processes_give_the_masks_of_one(tmp_path):
    tiny_llama(tmp_path / "model")
    tiny_text(tmp_path / "text.txt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29817"]
    two = subprocess.run(
        [*torchrun, "-m", "layerwise", *COMPRESS, "-o", "two", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["result"]["zeros"] == LAYERS // 2  # one rank speaks
    one = subprocess.run([sys.executable, "-m", "layerwise", *COMPRESS, "-o", "one"], cwd=tmp_path, check=False)
    assert one.returncode == 0
    expected = weights(tmp_path / "one")
    assert all(((tensor == 0) == (expected[name] == 0)).all() for name, tensor in weights(tmp_path / "two").items())
    failed = subprocess.run(
        [*torchrun, "-m", "layerwise", *COMPRESS, "-o", "two"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert failed.returncode != 0
    assert sum(line.startswith("layerwise: ") for line in failed.stderr.splitlines()) == 1


def test_blocks_are_tuned_and_the_record_says_so(here, same_process, capsys):
    asked = [*COMPRESS, "--reconstruct", "--reconstruct-set", "epochs=2", "--reconstruct-set", "lr=1e-3"]
    assert main([*asked, "-o", "out"]) == 0
    assert "3 blocks: error " in capsys.readouterr().out
    assert zeros(here / "out") == LAYERS // 2
    record = json.loads((here / "out" / "layerwise.json").read_text())["result"]["reconstruction"]
    assert (record["epochs"], record["lr"], record["target"]) == (2, 1e-3, "dense")
    assert [one["block"] for one in record["blocks"]] == [f"model.layers.{index}" for index in range(3)]
    assert main([*COMPRESS, "-o", "plain"]) == 0
    assert any(not tensor.equal(weights(here / "out")[name]) for name, tensor in weights(here / "plain").items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reconstruct-set", "lr=1"], "--reconstruct-set: not used, since it goes with --reconstruct"),
        (["--reconstruct", "--reconstruct-set", "lrr=1"], 'no setting "lrr". Did you mean "lr"?'),
        (["--reconstruct", "--reconstruct-set", "lr=0"], "Reconstruction: lr=0.0: give above 0."),
        (["--reconstruct", "--batch", "4"], "there is 1. Give more samples, or smaller batches (--batch)."),
    ],
)
def test_reconstruction_that_cannot_be_is_refused(here, same_process, capsys, words, said):
    assert main([*COMPRESS, *words, "-o", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "out").exists()
    assert not (here / "out.work").exists()
