"""Blocks in turn in the stock transformers Trainer: an optimiser built once, checkpoints that go on in the same bits, masks beside them."""

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

from layerwise.errors import ConfigError
from layerwise.recover import LayerSampling, LowRank, LowRankAdam, Masks
from layerwise.structure import structure_of
from models import small_llama


class Ids(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(4, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    def __init__(self):
        self.history = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        names = [name for name, one in kwargs["model"].named_parameters() if one.grad is not None]
        self.history.append(sorted({name.split(".")[2] for name in names if "layers" in name}))


def started(folder, steps=8, callbacks=(), low_rank=LowRank(4), optimizer=True, settings=None, **arguments):  # noqa: B008
    model = small_llama(num_hidden_layers=4)
    sampling = LayerSampling(model, **{"blocks": 2, "period": 2, "low_rank": low_rank, "seed": 2, **(settings or {})})
    watch = Watch()
    given = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3, seed=1,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", learning_rate=1e-2, max_grad_norm=1.0, **arguments,
    )  # fmt: skip
    groups = sampling.groups(1e-2, weight_decay=0.1)
    made = (LowRankAdam if low_rank else torch.optim.AdamW)(groups) if optimizer else None
    job = Trainer(
        model, given, train_dataset=Ids(), optimizers=(made, None), callbacks=[sampling.callback(), watch, *callbacks]
    )
    return model, sampling, job, watch


def undisturbed(run):
    """The Trainer seeds everything it finds."""
    with torch.random.fork_rng(devices=[]):
        return run()


def test_blocks_take_turns_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
    model, sampling, job, watch = started(tmp_path)
    undisturbed(job.train)
    wanted = [[name.rpartition(".")[2] for name in sampling.drawn(step // 2)] for step in range(8)]
    assert watch.history == wanted
    assert len({str(one) for one in wanted}) > 2
    assert all(parameter.requires_grad for parameter in model.parameters())
    for restored in (False, True):  # the Trainer replaces its callbacks with the second
        again, _, job, later = started(tmp_path, restore_callback_states_from_checkpoint=restored)
        undisturbed(lambda: job.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
        if not restored:  # the recorder is not one that is restored
            assert later.history == wanted[3:]
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_trainers_own_optimiser_knows_every_block(tmp_path):
    """It is built before anything is frozen; with a callback that freezes in its constructor it would miss most of the model."""
    model, _, job, watch = started(tmp_path, low_rank=None, optimizer=False, save_strategy="no")
    undisturbed(job.train)
    assert sum(len(group["params"]) for group in job.optimizer.param_groups) == len(list(model.parameters())) == 39
    assert len({str(one) for one in watch.history}) > 2


def test_activations_that_are_computed_again_change_nothing(tmp_path):
    weights = []
    for again in (False, True):
        model, _, job, watch = started(
            tmp_path, steps=4, settings={"always": ()}, gradient_checkpointing=again, save_strategy="no"
        )
        undisturbed(job.train)
        assert len({str(one) for one in watch.history}) == 2
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.allclose(value, weights[1][name], atol=1e-6) for name, value in weights[0].items())
    assert not torch.equal(
        weights[0]["model.layers.1.mlp.up_proj.weight"],
        small_llama(num_hidden_layers=4).state_dict()["model.layers.1.mlp.up_proj.weight"],
    )


def test_other_settings_or_no_sampling_in_the_checkpoint_are_refused(tmp_path):
    *_, job, _ = started(tmp_path, steps=3)
    undisturbed(job.train)
    *_, job, _ = started(tmp_path, settings={"period": 4, "seed": 6})
    with pytest.raises(ConfigError, match="period was 2, is 4; seed was 2, is 6"):
        undisturbed(lambda: job.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    *_, job, _ = started(tmp_path / "plain", steps=3)
    job.callback_handler.callbacks = [
        one for one in job.callback_handler.callbacks if "Sampling" not in type(one).__name__
    ]
    undisturbed(job.train)
    *_, job, _ = started(tmp_path / "plain")
    with pytest.raises(ConfigError, match="written without layer sampling"):
        undisturbed(lambda: job.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3")))


def test_masks_hold_beside_it(tmp_path):
    model, sampling, _, _ = started(tmp_path)
    masks = Masks(
        model, {layer.name: torch.ones(layer.shape, dtype=torch.bool).triu() for layer in structure_of(model)}
    )
    given = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    optimizer = LowRankAdam(sampling.groups(1e-2))
    calls = [masks.callback(), sampling.callback()]
    undisturbed(Trainer(model, given, train_dataset=Ids(), optimizers=(optimizer, None), callbacks=calls).train)
    assert masks.leaked() == 0
    assert any("projector" in state for state in optimizer.state.values())


def test_another_model_and_waiting_processes_are_refused(tmp_path):
    from layerwise.recover.sampling_trainer import _check

    _, sampling, job, _ = started(tmp_path)
    with pytest.raises(ConfigError, match="other parameters than the one the blocks are drawn from"):
        _check(sampling, job.args, small_llama(num_hidden_layers=4))

    class Two:
        world_size, ddp_find_unused_parameters = 2, None

    with pytest.raises(ConfigError, match="ddp_find_unused_parameters=True"):
        _check(sampling, Two, sampling.model)
