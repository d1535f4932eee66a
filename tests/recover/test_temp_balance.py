"""Learning rates by layer: the map by hand, groups that hold every parameter once, steps with the right rate and moments that stay."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerwise.errors import ConfigError, ModelError, ScoreError
from layerwise.recover import TempBalance, learning_rates
from layerwise.scores import Look, Windows, fit_tail, spectrum
from models import MODELS, inputs_for

FEW = Look(None, "mid", fewest=5)


def test_learning_rates_worked_by_hand():
    alphas = {"a": 2.0, "b": 3.0, "c": 5.0}
    assert learning_rates(alphas, 0.1) == pytest.approx({"a": 0.05, "b": 0.083333, "c": 0.15}, abs=1e-6)
    assert learning_rates(alphas, 0.1, map_by="rank") == pytest.approx({"a": 0.05, "b": 0.1, "c": 0.15})
    by_root = learning_rates(alphas, 0.1, map_by="sqrt")
    assert by_root["c"] / by_root["a"] == pytest.approx(math.sqrt(2.5))
    assert sum(by_root.values()) / 3 == pytest.approx(0.1)
    by_log = learning_rates({"a": 2.0, "b": 4.0, "c": 8.0}, 0.1, map_by="log2")
    assert by_log == pytest.approx({"a": 0.05, "b": 0.1, "c": 0.15})
    assert learning_rates({"a": 3.0, "b": 3.0}, 0.1) == {"a": 0.1, "b": 0.1}
    assert learning_rates({}, 0.1) == {}


@pytest.mark.parametrize(
    ("alphas", "given"),
    [({"a": math.nan}, {}), ({"a": 0.0}, {}), ({"a": 2.0}, {"low": 2.0}), ({"a": 2.0, "b": 3.0}, {"map_by": "cubic"})],
)
def test_what_gives_no_rate_is_refused(alphas, given):
    with pytest.raises(ConfigError):
        learning_rates(alphas, 0.1, **given)


def test_a_resnet_has_a_group_for_each_convolution_with_its_norm():
    model = MODELS["cifar_resnet"]()
    balance = TempBalance(model, look=FEW)
    names = [layer.name for layer in balance.layers]
    assert names[0] == "layer1.0.conv1"  # the stem and the head keep the global rate
    assert "fc" not in names
    assert TempBalance(model, ends=True).layers[0].name == "conv1"
    groups = {group["layer"]: group["params"] for group in balance.groups(5e-4)}
    held = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    block = model.layer2[1]
    assert {id(one) for one in groups["layer2.1.conv2"]} == {
        id(block.conv2.weight),
        id(block.bn2.weight),
        id(block.bn2.bias),
    }
    assert {id(model.conv1.weight), id(model.fc.bias)} <= {id(one) for one in groups[""]}


def test_biases_and_norms_can_go_without_decay():
    model = MODELS["vit"]()
    groups = TempBalance(model, look=FEW).groups(0.1, decay_all=False)
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_layers_are_left_alone():
    model = MODELS["llama"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    balance = TempBalance(model, look=FEW)
    assert {layer.name.split(".")[3] for layer in balance.layers} == {"mlp"}
    assert len(balance.groups()) == 6  # and no group for the rest
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="none is trained"):
        TempBalance(model)


def test_update_measures_the_weights_as_they_are():
    model = MODELS["llama"]()
    balance = TempBalance(model, 0.5, 1.5, look=FEW)
    alphas = dict(balance.update())
    up = "model.layers.1.mlp.up_proj"
    assert alphas[up] == pytest.approx(
        fit_tail(spectrum(model.model.layers[1].mlp.up_proj.weight.detach()), "mid").alpha, rel=1e-4
    )
    assert min(balance.factors.values()) == 0.5
    assert max(balance.factors.values()) == 1.5
    assert balance.factors == learning_rates(alphas, 1.0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] *= 30
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert balance.update()[up] != alphas[up]
    assert "model.layers.0.mlp.up_proj" not in balance.factors  # it keeps the global rate
    assert balance.notes[0].startswith("model.layers.0.mlp.up_proj: no alpha")
    windowed = TempBalance(model, look=Look(Windows(8, 1.0, 3), "mid")).update()
    assert windowed[up] != balance.alphas[up]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ScoreError, match=r"layers\.1\.mlp\.up_proj"):
        balance.update()


def losses_of(model, steps, optimizer, *, before_step=lambda step: None, after_step=lambda step: None):
    for step in range(steps):
        before_step(step)
        batch = inputs_for("llama", model, seed=step)["input_ids"]
        logits = model(input_ids=batch).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_equal_those_of_an_optimiser_for_each_parameter(kind):
    """The oracle: every parameter has an optimiser of its own, whose rate is set by hand before each step; its moments cannot get lost."""
    model = MODELS["llama"]()
    twin = copy.deepcopy(model)
    make = {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0),
    }[kind]
    balance = TempBalance(model, look=FEW)
    optimizer = make(balance.groups())
    balance.watch(optimizer)
    # goes on from the last rate that it finds in the groups, so a rate left multiplied would be multiplied again
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rates, factors = [], []

    def epoch(step):
        if step % 2 == 0:
            balance.update()
        rates.append(optimizer.param_groups[0]["lr"])
        factors.append(dict(balance.factors))

    losses_of(model, 6, optimizer, before_step=epoch, after_step=lambda step: scheduler.step())
    base = 0.1 if kind == "sgd" else 0.01
    assert rates == pytest.approx([base * 0.9**step for step in range(6)])
    assert factors[0] != factors[2] != factors[4]

    owner = {parameter: layer.name for layer in balance.layers for parameter in [layer.parameter]}
    own = {name: make([parameter]) for name, parameter in twin.named_parameters()}

    class All:
        def step(self):
            for one in own.values():
                one.step()

        def zero_grad(self):
            for one in own.values():
                one.zero_grad()

    def by_hand(step):
        for name, one in own.items():
            one.param_groups[0]["lr"] = rates[step] * factors[step].get(owner.get(name, ""), 1.0)

    losses_of(twin, 6, All(), before_step=by_hand)
    for (name, one), two in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7), name


def test_an_optimiser_of_other_groups_is_refused_and_handles_end_it():
    model = MODELS["llama"]()
    balance = TempBalance(model, look=FEW)
    with pytest.raises(ConfigError, match=r"no group for layer .* balance\.groups\(\)"):
        balance.watch(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(balance.groups(), lr=0.1)
    handles = balance.watch(optimizer)
    balance.update()
    seen = []
    optimizer.register_step_pre_hook(lambda one, *_: seen.append({group["lr"] for group in one.param_groups}))
    losses_of(model, 1, optimizer)
    for handle in handles:
        handle.remove()
    losses_of(model, 1, optimizer)
    assert len(seen[0]) > 2
    assert seen[1] == {0.1}


def test_rates_left_by_a_step_that_failed_are_put_right():
    model = MODELS["llama"]()
    balance = TempBalance(model, look=FEW)
    optimizer = torch.optim.SGD(balance.groups(), lr=0.1)
    balance.watch(optimizer)
    balance.update()

    def fails():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fails)
    losses_of(model, 1, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_the_stock_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="the stock Trainer needs it: layerwise[train]")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = MODELS["llama"]()
    rows = [
        {"input_ids": ids, "labels": ids}
        for seed in range(4)
        for ids in inputs_for("llama", model, seed=seed)["input_ids"]
    ]
    balance = TempBalance(model, look=FEW)
    optimizer = torch.optim.AdamW(balance.groups(0.01), lr=0.01)
    seen, factors = [], []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            factors.append(dict(balance.factors))

    optimizer.register_step_post_hook(
        lambda one, *_: seen.append({group["layer"]: group["lr"] for group in one.param_groups})
    )
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", lr_scheduler_type="linear", logging_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[balance.callback(), Watch()]
    )
    trainer.train()
    assert len(seen) == 6  # two steps an epoch
    assert len(factors) == 3
    assert factors[0] != factors[1] != factors[2]
    for step, rates in enumerate(seen):  # the hook above was there first: it sees the rate of the step itself
        scheduled = 0.01 * (6 - step) / 6
        for layer, rate in rates.items():
            assert rate == pytest.approx(scheduled * factors[step // 2].get(layer, 1.0)), (step, layer)
    assert len(optimizer.state) == len([one for one in model.parameters() if one.requires_grad])
    with pytest.raises(ConfigError, match="no group for layer"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[balance.callback()]).train()


def test_a_run_resumed_within_an_epoch_trains_as_it_would_have(tmp_path):
    pytest.importorskip("accelerate", reason="the stock Trainer needs it: layerwise[train]")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def run(folder, stop=None, resume=None):
        model = MODELS["llama"]()
        rows = [
            {"input_ids": ids, "labels": ids}
            for ids in (inputs_for("llama", model, seed=i)["input_ids"][0] for i in range(6))
        ]
        balance = TempBalance(model, look=FEW)
        optimizer = torch.optim.SGD(balance.groups(), lr=0.3, momentum=0.9)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    control.should_save = control.should_training_stop = True

        arguments = TrainingArguments(
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=2, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", use_cpu=True, seed=0,
        )  # fmt: skip
        callbacks = [balance.callback(), Stop()]
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=callbacks).train(
            resume_from_checkpoint=resume
        )
        return model

    whole = run("whole")
    for stop in (2, 3):  # within the first epoch, and at its end
        run(f"cut{stop}", stop=stop)
        again = run(f"cut{stop}", resume=str(tmp_path / f"cut{stop}" / f"checkpoint-{stop}"))
        assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))


def test_only_stems_and_heads_are_ends():
    """A tied head is the embedding's table: the last matrix of the last block is no head."""
    tied, untied = MODELS["gpt2"](), MODELS["llama"]()
    assert TempBalance(tied).layers[-1].name == "transformer.h.1.mlp.c_proj"
    names = [layer.name for layer in TempBalance(untied).layers]
    assert (names[0], names[-1]) == ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
