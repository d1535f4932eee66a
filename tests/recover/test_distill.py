"""Learning from a teacher, and the plain loop: numbers by hand, masks, randomness, errors."""

import copy
import math

import pytest
import torch
from torch import nn

from layerwise.errors import ConfigError, DataError, ModelError, TrainError
from layerwise.recover import Distillation, distillation_loss, fine_tune, masks_of, warm_cosine
from layerwise.tasks.losses import loss_of
from models import MODELS, inputs_for


def batches_of(name, model, count=3, classes=2):
    found = []
    for seed in range(count):
        batch = inputs_for(name, model, batch=4, seed=seed)
        if "pixel_values" in batch:
            batch["labels"] = torch.arange(4) % classes
        found.append(batch)
    return found


def test_worked_by_hand():
    """p = (3/4, 1/4) against q = (1/2, 1/2): 0.75 log 1.5 + 0.25 log 0.5."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(torch.zeros(1, 2), teacher) == pytest.approx(expected)
    softened = distillation_loss(torch.zeros(1, 2), 2 * teacher, temperature=2.0)
    assert softened == pytest.approx(4 * expected)
    assert distillation_loss(teacher, teacher) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ModelError, match="same classes"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["timm_vit", "vit", "llama", "t5"])
def test_the_mixture_is_of_the_tasks_loss_and_the_divergence(name):
    model, teacher = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    batch = batches_of(name, model)[0]
    teacher.train()
    task, taught = loss_of(model, batch), Distillation(teacher, alpha=1.0)(model, batch)
    mixed = Distillation(teacher, alpha=0.25)(model, batch)
    assert teacher.training
    assert taught > 0
    torch.testing.assert_close(mixed, 0.75 * task + 0.25 * taught)
    torch.testing.assert_close(Distillation(teacher, alpha=0.0)(model, batch), task)
    assert abs(float(Distillation(copy.deepcopy(model), alpha=1.0)(model, batch).detach())) < 1e-6
    mixed.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_distillation_token_learns_from_the_teacher_and_the_class_token_labels():
    import transformers

    from models import VISION

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION)).eval()
    teacher = MODELS["deit"]()
    batch = batches_of("deit", teacher)[0]
    both = Distillation(teacher, alpha=0.5)
    value = both(model, batch)
    said = model(pixel_values=batch["pixel_values"])
    with torch.no_grad():
        target = teacher(pixel_values=batch["pixel_values"]).logits
    own = nn.functional.cross_entropy(said.cls_logits, batch["labels"])
    torch.testing.assert_close(value, 0.5 * own + 0.5 * distillation_loss(said.distillation_logits, target))


def test_without_labels_the_teacher_alone_will_do():
    model, teacher = MODELS["timm_vit"](), MODELS["timm_vit"]()
    batch = {"pixel_values": inputs_for("timm_vit", model)["pixel_values"]}
    assert Distillation(teacher, alpha=1.0)(model, batch).isfinite()
    with pytest.raises(DataError, match="labels"):
        Distillation(teacher)(model, batch)


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"alpha": 1.5}, {"temperature": 0.0}, {"temperature": math.inf}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Distillation(nn.Linear(1, 1), **bad)


def test_a_model_cannot_teach_itself():
    model = MODELS["timm_vit"]()
    with pytest.raises(ConfigError, match="teacher is the model that is trained"):
        Distillation(model)(model, batches_of("timm_vit", model)[0])


def pruned(model):
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[:16, :16] = 0
    return model


def test_masks_hold_and_the_loss_falls():
    teacher, model = MODELS["timm_vit"](), pruned(MODELS["timm_vit"]())
    keep = masks_of(model)
    data = batches_of("timm_vit", model, classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    seen = []
    means = fine_tune(
        model, data, optimizer, epochs=8, keep=keep, loss=Distillation(teacher), clip=1.0,
        schedule=warm_cosine(optimizer, 24), progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(means) == 8
    assert means[-1] < 0.8 * means[0]
    assert seen == [(i, 24) for i in range(1, 25)]
    for block in model.blocks:
        assert not block.mlp.fc1.weight[:16, :16].any()
        assert block.mlp.fc1.weight[16:].ne(0).all()
    optimizer.step()  # the masks were let go
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_global_streams_stand_still():
    def trained(seed):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        data = [{"x": torch.eye(4) * (i + 1), "labels": torch.tensor([0, 1, 0, 1])} for i in range(3)]

        def noisy(batch, draw):
            return {**batch, "x": batch["x"] + torch.randn(4, 4, generator=draw)}

        state = torch.get_rng_state()
        fine_tune(model, data, torch.optim.SGD(model.parameters(), 0.1), epochs=2, seed=seed, augment=noisy)
        assert torch.equal(torch.get_rng_state(), state)
        return model[0].weight

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


def test_bad_runs_are_said():
    model = MODELS["timm_vit"]()
    data, optimizer = batches_of("timm_vit", model), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(DataError, match="at least one batch"):
        fine_tune(model, [], optimizer)
    with pytest.raises(ConfigError, match="epochs=0"):
        fine_tune(model, data, optimizer, epochs=0)
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"clip={clip:g}: give a finite norm above 0"):
            fine_tune(model, data, optimizer, clip=clip)
    with pytest.raises(ConfigError, match="float16 weights"):
        fine_tune(MODELS["timm_vit"]().half(), data, optimizer)
    before = copy.deepcopy(model.state_dict())
    broken = [{**data[0], "pixel_values": data[0]["pixel_values"] * torch.nan}]
    with pytest.raises(TrainError, match=r"epoch 1, batch 0: the loss is nan"):
        fine_tune(model, broken, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_warm_cosine_by_hand():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = warm_cosine(optimizer, 10, warm=0.2, floor=0.1)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="steps=0"):
        warm_cosine(optimizer, 0)
