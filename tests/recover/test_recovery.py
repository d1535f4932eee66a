"""Recovery on the stock Trainer: masks, resuming, early stopping, what is counted in a step, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from layerwise.errors import ConfigError, DataError, TrainError
from layerwise.recover import Distillation, Masks, Recovery, masks_of
from layerwise.recover.rates import cosine
from layerwise.recover.recovery import RUN, clear
from layerwise.recover.stock import LossTrainer, Stock, _with_labels
from models import MODELS, inputs_for, small_llama

transformers = pytest.importorskip("transformers")


def sparse(seed=0):
    """A Llama with half of every projection at zero."""
    model = small_llama(seed, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter *= torch.rand(parameter.shape, generator=draw) < 0.5
    return model


def text(count=6, seed=0, length=12):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": (torch.randint(2, 8, (2, length), generator=draw).cumsum(1)) % 40} for _ in range(count)]


HELD = text(2, seed=9)


def run(model, work, *, teacher=None, keep=None, data=None, progress=None, **settings):
    recovery = Recovery(**{"steps": 6, "lr": 1e-2, "looks": 3, **settings})
    return recovery.train(model, data or text(), HELD, teacher=teacher, keep=keep, work=work, progress=progress)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "more", [{}, {"accumulate": 2}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"hidden": 0.1}]
)
def test_the_loss_falls_zeros_stay_and_the_world_is_as_it_was(tmp_path, more):
    model, teacher = sparse(), small_llama(0, dtype=torch.float32)
    keep, state = masks_of(model), torch.get_rng_state()
    found = run(model, tmp_path / "work", teacher=teacher, keep=keep, **more)
    assert found.after < found.before
    assert found.after == min(loss for *_, loss in found.history)
    assert found.steps == 6
    assert found.leaked == 0
    assert [step for step, *_ in found.history] == [0, 2, 4, 6]
    parameters = dict(model.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in keep.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert all(one.grad is None for one in teacher.parameters())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    teacher, whole, again = small_llama(0, dtype=torch.float32), sparse(), sparse()
    keep = masks_of(whole)
    expected = run(whole, tmp_path / "a", teacher=teacher, keep=keep)

    def stop(moment):
        if moment.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(again, tmp_path / "b", teacher=teacher, keep=keep, progress=stop)
    fresh = sparse()
    found = run(fresh, tmp_path / "b", teacher=teacher, keep=keep)
    assert found.resumed == 4
    assert [(step, loss) for step, _, _, loss in found.history] == [(s, loss) for s, _, _, loss in expected.history]
    assert same(weights(whole), weights(fresh))
    third = sparse()  # a run that has ended gives its best state again
    assert run(third, tmp_path / "b", teacher=teacher, keep=keep).after == expected.after
    assert same(weights(whole), weights(third))
    clear(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_that_is_not_whole_is_passed_by(tmp_path):
    model = sparse()

    def stop(moment):
        if moment.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, progress=stop)
    (tmp_path / "checkpoint-4" / RUN).unlink()
    assert run(sparse(), tmp_path).resumed == 2


def test_other_settings_are_refused_with_the_difference(tmp_path):
    run(sparse(), tmp_path)
    with pytest.raises(ConfigError, match=r"lr: 0\.01 then, 0\.02 now"):
        run(sparse(), tmp_path, lr=0.02)
    with pytest.raises(ConfigError, match=r"model: .* then, .* now"):
        run(sparse(1), tmp_path)
    with pytest.raises(ConfigError, match=r"data: .* then"):
        run(sparse(), tmp_path, data=text(seed=3))


def test_a_loss_that_is_no_number_stops_and_the_best_state_stays(tmp_path):
    model = sparse()

    def spoil(moment):
        if moment.step == 3:
            model.model.norm.weight.data.fill_(math.nan)

    with pytest.raises(TrainError, match=r"step 4: the loss is nan.*weights of step 2 are kept"):
        run(model, tmp_path, progress=spoil)
    assert all(one.isfinite().all() for one in model.parameters())
    assert (tmp_path / "checkpoint-2" / RUN).exists()


def test_it_ends_when_nothing_is_gained_and_gives_back_what_it_got(tmp_path):
    model = sparse()
    before = weights(model)
    found = run(model, tmp_path, steps=40, looks=20, patience=2, lr=5.0, clip=1e9)
    assert "has not fallen in 2 looks" in found.why
    assert found.steps < 40
    assert found.after <= found.before
    if found.best == 0:
        assert same(before, weights(model))


def test_every_step_has_the_rate_of_its_own_place(tmp_path):
    """Warm-up to the middle, cosine from there; a stage of a longer run warms up at the pace of the whole."""
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        run(sparse(), tmp_path, warm=0.5, lr=1e-3)
    finally:
        hook.remove()
    warm = [1 / 3, 2 / 3, 1.0]
    assert rates == pytest.approx([1e-3 * one for one in [*warm, *(cosine(step / 6, 0.5) for step in (3, 4, 5))]])
    part = Recovery(steps=10, begin=0.0, end=0.005)  # of 2000, 100 of which warm up
    assert Stock(part, sparse(), [], None, None, None, tmp_path, None).factor(0) == pytest.approx(1 / 100)


def test_minutes_end_a_run(tmp_path):
    found = run(sparse(), tmp_path, steps=None, minutes=0.02, looks=2)
    assert found.why == "0.02 minutes"
    assert found.seconds >= 1.2
    assert found.steps > 3


@pytest.mark.parametrize("name", ["vit", "t5", "timm_vit"])
def test_other_tasks(tmp_path, name):
    model, teacher = MODELS[name](), MODELS[name]()
    data = [inputs_for(name, model, batch=4, seed=seed) for seed in range(4)]
    for one in data:
        if "pixel_values" in one:
            one["labels"] = torch.arange(4) % 2
    found = Recovery(steps=4, lr=1e-3, looks=2).train(model, data[:3], data[3:], teacher=teacher, work=tmp_path)
    assert math.isfinite(found.after)


def test_without_labels_the_teacher_judges(tmp_path):
    model, teacher = MODELS["vit"](), MODELS["vit"]()
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
    data = [{"pixel_values": inputs_for("vit", model, batch=4, seed=seed)["pixel_values"]} for seed in range(4)]
    found = Recovery(steps=8, lr=1e-4, looks=4, alpha=1.0).train(
        model, data[:3], data[3:], teacher=teacher, work=tmp_path
    )
    assert found.after < found.before
    with pytest.raises(DataError, match="labels"):
        Recovery(steps=2).train(model, data[:3], data[3:], work=tmp_path / "other")


def test_what_is_refused(tmp_path):
    model = sparse()
    with pytest.raises(ConfigError, match="minutes or steps"):
        Recovery()
    for name, value in {
        "lr": 0,
        "warm": 1,
        "patience": 0,
        "precision": "int8",
        "alpha": 2,
        "minutes": -1,
        "steps": 0,
    }.items():
        with pytest.raises(ConfigError, match=name):
            Recovery(**{"steps": 1, name: value})
    with pytest.raises(DataError, match="at least one batch"):
        Recovery(steps=1).train(model, [], HELD, work=tmp_path)
    with pytest.raises(ConfigError, match="float16"):
        Recovery(steps=1).train(copy.deepcopy(model).half(), text(), HELD, work=tmp_path)
    with pytest.raises(ConfigError, match=r"other parameters|no such weight"):
        Recovery(steps=1).train(
            model, text(), HELD, work=tmp_path, keep={"nothing.here": torch.ones(2, 2, dtype=torch.bool)}
        )
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        Recovery(steps=1).train(model, text(), HELD, work=tmp_path)
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        Recovery(steps=1, gradient_checkpointing=True).train(nn.Linear(2, 2), text(), HELD, work=tmp_path)


def stepped(tmp_path, batches, accumulate, loss, masks=False):
    """Weights after one plain step on 16 rows, and the norm of its gradient."""
    model = sparse()
    held = Masks(model, masks_of(model)) if masks else None
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate,
        max_grad_norm=1.0, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        logging_steps=1,
    )  # fmt: skip
    rows = [_with_labels(model, batch) for batch in batches]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = LossTrainer(
        loss=loss, model=model, args=arguments, train_dataset=rows, data_collator=lambda items: dict(items[0]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[held.callback()] if held else [],
    )  # fmt: skip
    trainer.train()
    norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    return norm, weights(model)


@pytest.mark.parametrize("kind", ["task", "teacher", "whole", "hidden"])
def test_four_batches_to_a_step_are_as_one(tmp_path, kind):
    """16 samples of unequal length in one batch, or in four: the same gradient, for every loss. The hidden states' error is relative to
    the size of its own batch's, so it agrees where all lengths do."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (16, 10), generator=draw)
    mask = torch.ones_like(ids)
    if kind != "hidden":
        for row in range(16):
            mask[row, 10 - row % 5 :] = 0
    else:
        ids = ids[:4].repeat(4, 1)
    whole = {"input_ids": ids, "attention_mask": mask}
    parts = [{name: value[start : start + 4] for name, value in whole.items()} for start in range(0, 16, 4)]
    teacher = small_llama(1, dtype=torch.float32)
    losses = {
        "task": lambda: None,
        "teacher": lambda: Distillation(teacher, rows=7),
        "whole": lambda: Distillation(teacher, rows=None),
        "hidden": lambda: Distillation(teacher, alpha=0.5, hidden=0.3),
    }
    one, first = stepped(tmp_path, [whole], 1, losses[kind]())
    four, second = stepped(tmp_path, parts, 4, losses[kind]())
    assert one == pytest.approx(four, rel=1e-4)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


def test_the_masked_gradient_is_smaller(tmp_path):
    """Clipping sees the sparse model: its norm leaves out what is pruned."""
    free, _ = stepped(tmp_path, text(1), 1, None)
    held, _ = stepped(tmp_path, text(1), 1, None, masks=True)
    assert held < free
