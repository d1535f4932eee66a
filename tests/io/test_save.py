"""Saving: stock folders that load elsewhere, whole or not at all, and every refusal before anything is written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from layerwise.engine import Result
from layerwise.errors import ConfigError, OutputError, SaveError
from layerwise.io import load, load_into, needed_bytes, save, saved_report
from layerwise.io.whole import check_output, whole_folder
from layerwise.plan import Plan, Prune
from models import small_llama


def llama(tied: bool = True) -> LlamaForCausalLM:
    model = small_llama(num_key_value_heads=1, tie_word_embeddings=tied)
    model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    return model


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_model_is_checked_in_a_fresh_process_and_says_what_it_is(tmp_path):
    model = llama().bfloat16()
    model.generation_config.temperature = 0.7  # with do_sample off: transformers would refuse to save this
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Plan(method={"name": "uniform", "seed": 3}, layers={"model.layers.0.mlp.up_proj": Prune(sparsity=0.5)})
    saved = save(model, tmp_path / "a/b/out", plan=plan, result={"perplexity": {"dense": 12.5}})
    folder = tmp_path / "a/b/out"

    assert saved.verified is not None
    assert saved.verified.outputs == ("logits",)
    # .bfloat16() rounds the rotary frequencies too, which the loader keeps in float32: not bit-identical, within rounding
    assert saved.verified.difference is not None
    assert saved.verified.difference < 0.01
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"
    assert left_over(tmp_path / "a/b") == ["out"]

    again = load(folder)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())
    assert again.generation_config.temperature == model.generation_config.temperature == 0.7
    assert Plan.load(folder / "plan.yaml") == plan

    facts = json.loads((folder / "layerwise.json").read_text())
    assert facts["plan"]["fingerprint"] == plan.fingerprint
    assert facts["seed"] == 3
    assert facts["result"] == {"perplexity": {"dense": 12.5}}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["saved"]["zeros"] == 256 == saved.report.zeros
    card = (folder / "README.md").read_text()
    assert "| perplexity.dense | 12.5 |" in card
    assert "Zeros do not shrink this format" in card


def test_encoder_decoder_without_the_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    saved = save(model, tmp_path / "t5", verify=False)
    assert saved.verified is None
    assert "check was left out" in saved.lines()[-1]
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path / "t5").parameters(), model.parameters(), strict=True))


def test_a_module_of_ones_own_class_is_saved_with_its_ties(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].weight = model[0].weight
    saved = save(model, tmp_path / "own")
    assert saved.verified is not None
    assert saved.verified.loader == "layerwise.io.load_into"
    assert left_over(tmp_path / "own") == ["README.md", "layerwise.json", "model.safetensors"]
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    other[2].weight = other[0].weight
    load_into(other, tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_an_existing_output_is_refused_and_replaced_only_by_force(tmp_path):
    out = tmp_path / "out"
    save(llama(), out, verify=False)
    (out / "mine.txt").write_text("left by hand")
    with pytest.raises(OutputError, match="exists already"):
        save(llama(), out, verify=False)
    assert (out / "mine.txt").exists()
    save(llama(tied=False), out, verify=False, force=True)
    assert not (out / "mine.txt").exists()
    assert "lm_head.weight" in load(out).state_dict()
    assert left_over(tmp_path) == ["out"]


def test_force_replaces_no_folder_that_is_not_a_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "home/config.json").write_text("{}")  # of some other program
    with pytest.raises(OutputError, match="not a model folder"):
        save(llama(), tmp_path / "home", force=True)
    with pytest.raises(OutputError, match="not a model folder"):
        save(llama(), tmp_path / "home/thesis.txt", force=True)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    save(llama(), tmp_path / "out", verify=False)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_when_the_new_one_fails_the_old_one_stays(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save(llama(), out, verify=False)
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(SaveError, match="disk filled up"):
        save(llama(tied=False), out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert left_over(tmp_path) == ["out"]


def full_disk(model: nn.Module, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_words(model: nn.Module, folder: Path) -> None:  # what safetensors 0.8 says, seen on a full tmpfs
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_in_words])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, failure):
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", failure)
    with pytest.raises(SaveError, match="the disk filled up while writing") as error:
        save(llama(), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert left_over(tmp_path) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs about 33\.\d MB, .* has 1\.5 MB free"):
        save(llama(), tmp_path / "out")
    assert left_over(tmp_path) == []


def test_needed_bytes_counts_tied_tensors_once():
    assert needed_bytes(llama(tied=False)) - needed_bytes(llama()) == 64 * 16 * 4


def test_a_parent_that_is_a_file_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        save(llama(), tmp_path / "file/out")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="cannot be written"):
        save(llama(), tmp_path / "out")


def test_check_output_creates_nothing(tmp_path):
    assert check_output(tmp_path / "a/b") == tmp_path / "a/b"
    assert left_over(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert left_over(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def overtaken() -> None:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "new").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").write_text("theirs")

    with pytest.raises(OutputError, match="appeared while working"):
        overtaken()
    assert (tmp_path / "out/theirs").read_text() == "theirs"
    assert left_over(tmp_path) == ["out"]


def test_the_report_in_plain_words(tmp_path):
    save_file({"w": torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "norm": torch.zeros(3)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    report = saved_report(tmp_path, before=size)
    assert report.lines() == [
        f"Weights on disk: {size} bytes, {size} before.",
        "Zeros counted in the files: 3 of 4 values in matrices (75.0%).",
        "Zeros do not shrink this format and do not speed up a stock engine: same bytes, same speed.",
    ]
    assert len(saved_report(tmp_path, before=10 * size).lines()) == 2


def test_a_result_is_taken_as_it_is_and_anything_else_refused_before_the_work(tmp_path):
    result = Result(layers=(), seconds={"total": 1.5}, solver={"name": "wanda"}, data={})
    save(llama(), tmp_path / "out", result=result, verify=False)
    record = json.loads((tmp_path / "out/layerwise.json").read_text())
    assert record["result"] == json.loads(json.dumps(result.to_dict()))
    with pytest.raises(ConfigError, match="result is a float"):
        save(llama(), tmp_path / "other", result=0.5)
    assert left_over(tmp_path) == ["out"]
