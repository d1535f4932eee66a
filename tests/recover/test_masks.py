"""Masks held in a plain loop: nothing leaks under any optimiser, moments stay clean, and masks come back from files."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers.optimization import Adafactor

from layerwise.errors import ConfigError, DataError, ShapeError
from layerwise.methods import ERK, Uniform
from layerwise.recover import Masks, hold, kaiming_normal, masks_of, random_masks
from layerwise.structure import structure_of
from layerwise.tasks.losses import loss_of
from models import MODELS, CifarResNet, inputs_for, small_llama


class Projected(Optimizer):
    """GaLore in small: momentum of the gradient in the space of its r leading left directions, so that an update fills every column."""

    def __init__(self, params, lr, rank=2):
        super().__init__(params, {"lr": lr, "rank": rank})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter.ndim != 2:
                    continue
                state = self.state[parameter]
                if not state:
                    state["basis"] = torch.linalg.svd(parameter.grad)[0][:, : group["rank"]]
                    state["mean"] = torch.zeros(state["basis"].shape[1], parameter.shape[1])
                low = state["basis"].T @ parameter.grad
                state["mean"].mul_(0.9).add_(low)
                parameter.add_(state["basis"] @ state["mean"], alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda params: SGD(params, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adamw": lambda params: AdamW(params, 1e-2, weight_decay=0.1),
    "adam-foreach": lambda params: Adam(params, 1e-2, weight_decay=0.1, foreach=True),
    "adafactor": lambda params: Adafactor(params, lr=1e-2, relative_step=False, beta1=0.9),
    "projected": lambda params: Projected(params, 1e-2),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def drawn(model, structure, sparsity=0.5, seed=0):
    return random_masks(Uniform(sparsity=sparsity).plan(model, structure=structure), structure, seed)


def llama():
    model = small_llama()
    return model, structure_of(model)


def train(model, optimizer, steps=4, clip=1.0, accumulate=2):
    for step in range(steps):
        for part in range(accumulate):
            ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(10 * step + part))
            (loss_of(model, {"input_ids": ids}) / accumulate).backward()
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def leaks(model, keep):
    return sum(int((model.get_submodule(name).weight[~mask] != 0).sum()) for name, mask in keep.items())


@optimizers
def test_nothing_leaks(make):
    model, structure = llama()
    keep = drawn(model, structure)
    before = copy.deepcopy(model.state_dict())
    optimizer = make(model.parameters())
    with hold(model, keep, optimizer) as masks:
        train(model, optimizer)
    assert masks.leaked() == leaks(model, keep) == 0
    for name, mask in keep.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)  # what is kept is trained
        assert not torch.signbit(weight[~mask]).any()
        assert (weight[mask] != before[f"{name}.weight"][mask]).float().mean() > 0.95  # a small step may round to none


@pytest.mark.parametrize(("make", "leaky"), [(OPTIMIZERS["adamw"], False), (OPTIMIZERS["projected"], True)])
def test_the_hook_alone_is_not_enough_for_optimisers_that_project(make, leaky):
    model, structure = llama()
    keep = drawn(model, structure)
    optimizer = make(model.parameters())
    masks = Masks(model, keep)  # and watches no optimiser
    train(model, optimizer)
    assert (masks.leaked() > 100) == leaky
    assert masks.leaked() == leaks(model, keep)


def test_the_gradient_that_is_clipped_is_that_of_the_sparse_model():
    norms, pruned = [], 0.0
    for hooked in (True, False):
        model, structure = llama()
        keep = drawn(model, structure)
        masks = Masks(model, keep)
        if not hooked:
            masks.release()
        loss_of(model, {"input_ids": torch.arange(4, 28).reshape(2, 12)}).backward()
        norms.append(float(clip_grad_norm_(model.parameters(), 1e9)))
        pruned = sum(float(model.get_submodule(n).weight.grad[~mask].square().sum()) for n, mask in keep.items())
    assert pruned > 0
    assert norms[0] ** 2 == pytest.approx(norms[1] ** 2 - pruned)


def test_moments_of_a_dense_phase_are_cleaned():
    """With the hook alone they move every pruned weight of a layer; watched, none, and they are zero afterwards."""
    for watched in (False, True):
        model, structure = llama()
        keep = drawn(model, structure)
        optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.1)
        train(model, optimizer, steps=3)
        masks = Masks(model, keep)
        if watched:
            masks.watch(optimizer)
        train(model, optimizer, steps=5)
        pruned = sum(int((~mask).sum()) for mask in keep.values())
        assert masks.leaked() == (0 if watched else pruned)
        for name, mask in keep.items():
            state = optimizer.state[model.get_submodule(name).weight]
            assert bool(state["exp_avg"][~mask].any()) != watched
            assert bool(state["exp_avg_sq"][~mask].any()) != watched
            assert state["exp_avg_sq"][mask].all()


def test_a_weight_that_was_frozen_when_the_masks_were_made_is_masked_once_it_is_trained():
    model = nn.Linear(2, 2, bias=False).requires_grad_(False)
    keep = {"weight": torch.tensor([[True, False], [False, True]])}
    with hold(model, keep):
        assert not model.weight.requires_grad  # frozen it stays
        model.requires_grad_()
        optimizer = AdamW(model.parameters(), 1e-2)
        model(torch.ones(1, 2)).sum().backward()
        assert model.weight.grad.tolist() == [[1, 0], [0, 1]]
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].count_nonzero() == 2
    assert not model.weight._backward_hooks


def test_twenty_steps_of_sgd_keep_exact_zeros_and_the_count():
    """A sparse network from scratch, as the paper trains it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarResNet(8, 1).train()
    structure = structure_of(model, include=["*"])
    kaiming_normal(model, structure, seed=1)
    plan = ERK(sparsity=0.9).plan(model, structure=structure)
    keep = random_masks(plan, structure, seed=1)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    images = inputs_for("cifar_resnet", model, batch=16)["pixel_values"]
    labels = torch.arange(16) % 10
    losses = []
    with hold(model, keep, optimizer):
        for _ in range(20):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # it learns
    total = sum(layer.size for layer in structure)
    nonzero = 0
    for layer in structure:
        weight = model.get_parameter(layer.parameter)
        assert (weight[~keep[layer.name]] == 0.0).all()
        assert int(torch.count_nonzero(weight)) == int(keep[layer.name].sum())
        nonzero += int(torch.count_nonzero(weight))
    assert nonzero == total - round(0.9 * total)


def test_a_density_of_one_is_masks_of_ones():
    model = CifarResNet(4, 1)
    structure = structure_of(model, include=["*"])
    before = copy.deepcopy(model.state_dict())
    for method in (ERK(sparsity=0.0), Uniform(sparsity=0.0)):
        keep = random_masks(method.plan(model, structure=structure), structure)
        assert len(keep) == len(structure.layers)
        assert all(mask.all() for mask in keep.values())
        masks = Masks(model, keep)
        assert masks.density == 1
        masks.release()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_released_there_is_nothing_left():
    model, structure = llama()
    keep = drawn(model, structure)
    optimizer = SGD(model.parameters(), 0.1)
    with hold(model, keep, optimizer) as masks:
        masks.watch(optimizer)  # twice is as good as once
        assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    train(model, optimizer)
    assert leaks(model, keep) > 0
    with pytest.raises(ZeroDivisionError), hold(model, keep, optimizer):
        raise ZeroDivisionError
    assert not optimizer._optimizer_step_post_hooks


def test_an_infinite_gradient_does_not_come_through_a_pruned_weight():
    weight = nn.Linear(2, 1, bias=False)
    nn.init.ones_(weight.weight)
    optimizer = SGD(weight.parameters(), 0.1)
    with hold(weight, {"weight": torch.tensor([[True, False]])}, optimizer):
        weight(torch.tensor([1.0, float("inf")])).nan_to_num(posinf=1.0).backward()
        weight.weight.grad[:, 0] = 1.0
        assert weight.weight.grad.tolist() == [[1.0, 0.0]]
        optimizer.step()
    assert weight.weight.tolist() == [[pytest.approx(0.9), 0.0]]


def test_masks_come_back_from_a_file_and_training_goes_on_as_if_never_stopped(tmp_path):
    def fresh():
        model, structure = llama()
        return model, drawn(model, structure), AdamW(model.parameters(), 1e-2)

    model, keep, optimizer = fresh()
    with hold(model, keep, optimizer):
        train(model, optimizer, steps=4)
    whole = copy.deepcopy(model.state_dict())

    model, keep, optimizer = fresh()
    with hold(model, keep, optimizer) as masks:
        train(model, optimizer, steps=4)
        masks.save(tmp_path)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    resumed, _, optimizer = fresh()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(copy.deepcopy(state[1]))  # it would share the tensors
    read = masks_of(tmp_path)
    assert read.keys() == {f"{name}.weight" for name in keep} == load_file(tmp_path / "masks.safetensors").keys()
    with hold(resumed, read, optimizer):
        train(resumed, optimizer, steps=2)
    with hold(model, keep, going := AdamW(model.parameters(), 1e-2)):
        going.load_state_dict(state[1])
        train(model, going, steps=2)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
    assert leaks(resumed, keep) == 0


def test_masks_can_be_exchanged_for_others_of_the_same_weights():
    model, structure = llama()
    first, second = (drawn(model, structure, 0.5, seed) for seed in (0, 1))
    masks, other = Masks(model, first), Masks(copy.deepcopy(model), second)
    masks.load_state_dict(other.state_dict())
    assert leaks(model, second) == 0
    loss_of(model, inputs_for("llama", None) | {"input_ids": torch.arange(12)[None]}).backward()
    for name, mask in second.items():
        grad = model.get_submodule(name).weight.grad
        assert not grad[~mask].any()
        assert grad[mask].any()
    state = masks.state_dict()
    name = next(iter(state))
    state[name][:] = True
    assert not masks.state_dict()[name].all()  # a copy
    with pytest.raises(ConfigError, match=r"is in one set alone"):
        masks.load_state_dict({name: state[name]})
    with pytest.raises(ShapeError, match=r"takes torch\.bool"):
        masks.load_state_dict(state | {name: state[name].float()})


def test_masks_in_any_memory_layout_can_be_saved(tmp_path):
    model = nn.Linear(3, 2)
    keep = torch.tensor([[True, False], [False, True], [True, True]]).T
    Masks(model, {"weight": keep}).save(tmp_path)
    assert torch.equal(masks_of(tmp_path)["weight"], keep)


def test_masks_of_a_model_that_is_pruned_already():
    model, structure = llama()
    keep = drawn(model, structure)
    Masks(model, keep).release()
    assert {name: mask.tolist() for name, mask in masks_of(model).items()} == {
        f"{name}.weight": mask.tolist() for name, mask in keep.items()
    }
    one = structure.layers[0].name
    assert list(masks_of(model, [one])) == [f"{one}.weight"]
    with pytest.raises(DataError, match="has no zeros in any matrix"):
        masks_of(MODELS["cifar_resnet"]())
    with pytest.raises(DataError, match=r"no masks\.safetensors in this folder"):
        masks_of("/nowhere")


def test_bad_masks_are_refused_before_anything_is_done():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(
        ConfigError, match=r'mask of "wieght": the model has no such weight. The nearest name is "weight"'
    ):
        Masks(model, {"wieght": torch.zeros(2, 3).bool()})
    for bad in (torch.zeros(3, 2).bool(), torch.zeros(2, 3)):
        with pytest.raises(
            ShapeError, match=r'mask of "weight" is torch\.\w+ .*; the weight takes torch.bool \(2, 3\)'
        ):
            Masks(model, {"weight": bad})
    for two in ({"0": torch.ones(2, 3).bool(), "0.weight": torch.ones(2, 3).bool()},
                {"0": torch.ones(2, 3).bool(), "1": torch.zeros(2, 3).bool()}):  # fmt: skip
        first, second = two
        words = rf'two masks are given for one weight, as "{first}" and as "{second}"'
        with pytest.raises(ConfigError, match=words):
            Masks(nn.Sequential(model, model), two)  # "0.weight" and "1.weight" are one parameter
    with pytest.raises(ConfigError, match="no masks to hold"):
        Masks(model, {})
    assert torch.equal(model.weight, before)
    assert not model.weight._backward_hooks
