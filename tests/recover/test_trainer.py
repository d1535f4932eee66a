"""Masks in the stock transformers Trainer: held, in every checkpoint, and a resumed run ends in the same bits."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from transformers import Trainer, TrainingArguments

from layerwise.errors import ConfigError
from layerwise.methods import Uniform
from layerwise.recover import Masks, masks_of, random_masks
from layerwise.structure import structure_of
from models import small_llama


class Ids(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(4, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def sparse(seed=0):
    model = small_llama()
    structure = structure_of(model)
    keep = random_masks(Uniform(sparsity=0.5).plan(model, structure=structure), structure, seed)
    return model, keep


def trainer(model, masks, folder, optim="adamw_torch", steps=6, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0, save_steps=3, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=1, optim=optim, seed=1, **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Ids(), callbacks=[masks.callback()])


def undisturbed(run):
    """The Trainer seeds everything it finds."""
    with torch.random.fork_rng(devices=[]):
        return run()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_nothing_leaks_and_every_checkpoint_holds_the_masks(optim, tmp_path):
    model, keep = sparse()
    masks = Masks(model, keep)
    job = trainer(model, masks, tmp_path, optim)
    undisturbed(job.train)
    assert job.state.global_step == 6
    assert masks.leaked() == 0
    for name, mask in keep.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
        for step in (3, 6):
            assert torch.equal(masks_of(tmp_path / f"checkpoint-{step}")[f"{name}.weight"], mask)
    if optim == "adamw_torch":
        for name, mask in keep.items():
            moments = job.optimizer.state[model.get_submodule(name).weight]
            assert not moments["exp_avg"][~mask].any()
            assert not moments["exp_avg_sq"][~mask].any()


def test_the_norm_that_is_clipped_is_smaller_with_the_hook(tmp_path):
    norms = []
    for held in (True, False):
        model, keep = sparse()
        masks = Masks(model, keep)
        job = trainer(model, masks, tmp_path / str(held), steps=1)
        if not held:
            masks.release()
        undisturbed(job.train)
        norms.append(job.state.log_history[0]["grad_norm"])
    assert norms[0] < norms[1]


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    model, keep = sparse()
    undisturbed(trainer(model, Masks(model, keep), tmp_path).train)
    again, _ = sparse()
    masks = Masks(again, masks_of(tmp_path / "checkpoint-3"))
    job = trainer(again, masks, tmp_path)
    undisturbed(lambda: job.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    assert masks.leaked() == 0
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_other_masks_is_refused(tmp_path):
    model, keep = sparse()
    undisturbed(trainer(model, Masks(model, keep), tmp_path, steps=3).train)
    other, others = sparse(seed=1)
    job = trainer(other, Masks(other, others), tmp_path)
    with pytest.raises(ConfigError, match="weights of the checkpoint are not zero where these masks prune"):
        undisturbed(lambda: job.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))


def test_masks_of_another_model_are_refused(tmp_path):
    model, keep = sparse()
    masks = Masks(copy.deepcopy(model), keep)
    with pytest.raises(ConfigError, match="other parameters than the one the masks are held on"):
        undisturbed(trainer(model, masks, tmp_path).train)


def test_galore_leaks_without_and_not_with_the_mask_after_every_step(tmp_path):
    pytest.importorskip("galore_torch")
    for held in (True, False):
        model, keep = sparse()
        masks = Masks(model, keep)
        job = trainer(
            model, masks, tmp_path / str(held), "galore_adamw",
            optim_target_modules=[r".*proj"], optim_args="rank=4,update_proj_gap=2,scale=1.0",
        )  # fmt: skip
        if not held:  # the hook on the gradient alone
            job.callback_handler.callbacks = [c for c in job.callback_handler.callbacks if not hasattr(c, "masks")]
        undisturbed(job.train)
        assert (masks.leaked() == 0) == held
