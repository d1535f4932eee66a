"""However it is trained (accumulated, in bfloat16, recomputed, in two processes, by TRL, by any optimiser), zeros stay and losses agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.optim import SGD, AdamW, Muon
from transformers.optimization import Adafactor

from layerwise.recover import LowRank, LowRankAdam, Masks, add_adapter, fine_tune, hold, masks_of, merge_adapter
from matrix import ROWS, STEPS, Ids, arguments_of, distillation, job, sparse

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def quiet():
    """The Trainer seeds everything it finds."""
    with torch.random.fork_rng(devices=[]):
        yield


def ended(tmp_path, loss=None, **more):
    """Weights, losses by step, and what leaked, after the stock Trainer."""
    model, keep = sparse()
    masks = Masks(model, keep)
    trainer = job(model, masks, arguments_of(tmp_path, **more), loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: one.detach().clone() for name, one in model.named_parameters()}, losses, masks.leaked()


@pytest.mark.parametrize("kind", ["task", "teacher"])
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-5),
        ({"per_device_train_batch_size": 4, "gradient_checkpointing": True}, 1e-6),
        ({"per_device_train_batch_size": 4, "bf16": True}, 3e-2),
    ],
    ids=["accumulated", "recomputed", "bfloat16"],
)
def test_losses_are_those_of_the_plain_run(tmp_path, kind, more, tolerance):
    loss = distillation if kind == "teacher" else lambda: None
    plain, first, _ = ended(tmp_path / "plain", loss(), per_device_train_batch_size=4)
    other, second, leaked = ended(tmp_path / "other", loss(), **more)
    assert leaked == 0
    assert len(first) == STEPS
    assert second == pytest.approx(first, rel=max(tolerance, 1e-4))
    if (
        "bf16" not in more
    ):  # Adam's first steps are of one size: where a gradient is nearly zero, rounding chooses its sign
        close = [torch.isclose(other[name], plain[name], atol=1e-4).float().mean() for name in plain]
        assert min(close) > 0.99


@pytest.mark.parametrize("kind", ["task", "teacher"])
def test_two_processes_are_as_one(tmp_path, kind):
    plain, _, _ = ended(tmp_path, distillation() if kind == "teacher" else None, per_device_train_batch_size=ROWS)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for _ in range(2):  # two launches at once may find the same free port
        found = subprocess.run(
            [*command, str(here / "masked_ddp.py"), str(tmp_path), kind],
            env=environment,
            check=False,
            timeout=240,
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            break
    assert found.returncode == 0, found.stderr[-3000:]
    ends = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert all(int(end.pop("leaked")) == 0 for end in ends)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for name, value in plain.items():
        assert torch.isclose(ends[0][name], value, atol=1e-4).float().mean() > 0.99, name


def both(matrices, others):
    """Muon is for matrices alone."""

    def make(model):
        known = [one for one in model.parameters() if one.requires_grad]
        return [
            matrices([one for one in known if one.ndim == 2]),
            others([one for one in known if one.ndim != 2]),
        ]

    return make


OPTIMIZERS = {
    "sgd": both(lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=5e-4), lambda p: SGD(p, 0.1)),
    "adamw": both(lambda p: AdamW(p, 1e-2), lambda p: AdamW(p, 1e-2)),
    "adafactor": both(lambda p: Adafactor(p, lr=1e-2, relative_step=False), lambda p: AdamW(p, 1e-2)),
    "galore": both(lambda p: LowRankAdam([{"params": p, "low_rank": LowRank(4)}], 1e-2), lambda p: AdamW(p, 1e-2)),
    "muon": both(lambda p: Muon(p, 1e-2), lambda p: AdamW(p, 1e-2)),
}


def one_step(optimizers):
    """Several as one."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimiser_leaks_in_a_plain_loop(name):
    model, keep = sparse()
    optimizers = OPTIMIZERS[name](model)
    with hold(model, keep, *optimizers) as masks:
        for step in range(4):
            rows = [Ids()[step * 2 + row] for row in range(2)]
            model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
            one_step(optimizers)
        assert masks.leaked() == 0
    for key, mask in keep.items():
        weight = model.get_parameter(key).detach()
        assert not weight[~mask].any()
        assert weight[mask].count_nonzero() > 0.99 * mask.sum()  # what is kept is trained, and does not end at zero


@pytest.mark.parametrize("kind", [None, "hira", "masked-lora"])
def test_trl_trains_with_masks_and_adapters(tmp_path, kind):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, keep = sparse()
    zeros = {name: int((model.get_parameter(name) == 0).sum()) for name in keep}
    if kind is not None:
        pytest.importorskip("peft")
        add_adapter(model, kind, rank=2)
    rows = datasets.Dataset.from_list([{"input_ids": Ids()[index]["input_ids"].tolist()} for index in range(12)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, bf16=False,
        save_strategy="no", report_to=[], disable_tqdm=True, max_length=12, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=words(tmp_path),
        callbacks=[Masks(model, keep).callback()] if kind is None else [],
    )  # fmt: skip
    trainer.train()
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved
    if kind is not None:
        assert all("hira_" in name or "lora_" in name for name in moved)
        merge_adapter(model)
    assert {name: int((model.get_parameter(name) == 0).sum()) for name in keep} == zeros
    assert masks_of(model).keys() == keep.keys()


def words(folder):
    """A tokenizer for SFTTrainer, which wants one even for rows of ids."""
    from tiny import tiny_llama

    return transformers.AutoTokenizer.from_pretrained(tiny_llama(folder / "words"), pad_token="<eos>")  # noqa: S106


@pytest.mark.parametrize("kind", ["hira", "masked-lora"])
def test_adapters_in_bfloat16_bases_keep_their_own_weights_wide(kind):
    pytest.importorskip("peft")
    model, keep = sparse()
    model = model.bfloat16()
    add_adapter(model, kind, rank=2)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {torch.float32}
    data = [{key: value[None] for key, value in Ids()[index].items()} for index in range(4)]
    fine_tune(model, data, AdamW(trained, 1e-2))
    merge_adapter(model)
    assert all(not model.get_parameter(name).detach()[~mask].any() for name, mask in keep.items())
