"""Cutting channels out of trained networks is zeroing what reads them; cropping makes a dense network of the widths asked for."""

import copy
import random

import pytest
import torch
from torch import nn

from cnns import CNNS, IMAGE, Toy, filled
from layerwise.errors import ConfigError, ModelError, PlanError
from layerwise.plan import Plan, Prune, Resize
from layerwise.shrink import crop, shrink_channels, zero_channels
from layerwise.structure import cnn_channels


def images(count=3, size=IMAGE):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def drawn(channels, seed):
    draw = random.Random(seed)  # noqa: S311
    return {
        # of depthwise convolutions two stay: one alone would be read as an ordinary convolution afterwards
        group.name: sorted(draw.sample(range(group.units), draw.randint(min(2, group.units), max(2, group.units - 1))))
        for group in channels.groups
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CNNS)
@torch.no_grad()
def test_removing_is_zeroing(name, seed):
    model = filled(CNNS[name]()).double()
    channels, x = cnn_channels(model, IMAGE), images().double()
    keep, dense = drawn(channels, seed), model(x)
    zeroed = copy.deepcopy(model)
    zero_channels(zeroed, keep, channels)
    shrink_channels(model, keep, channels)
    assert torch.allclose(model(x), zeroed(x), rtol=1e-9, atol=1e-11)
    assert all(len(units) == channels.widths[group] for group, units in keep.items()) or not torch.allclose(
        model(x), dense
    )
    widths = {group: len(units) for group, units in keep.items()}
    again = cnn_channels(model, IMAGE)
    assert again.widths == widths  # what it says of itself has changed, too
    assert again.parameters({}) == channels.parameters(widths)
    for layer in again.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.BatchNorm2d):
            assert len(module.running_mean) == module.num_features == len(module.weight)


def test_bad_units_change_nothing():
    model = Toy()
    channels = cnn_channels(model, IMAGE)
    with pytest.raises(ModelError, match="fc"):
        shrink_channels(model, {"fc": [0]}, channels)
    with pytest.raises(ConfigError, match="none of its 16"):
        shrink_channels(model, {"stem": []}, channels)
    assert cnn_channels(model, IMAGE) == channels


def planned(widths, image="3x8x8"):
    return Plan(
        method={"name": "precrop", "image_size": image}, layers={n: Resize(channels=w) for n, w in widths.items()}
    )


@pytest.mark.parametrize("wider", [False, True], ids=["narrower", "wider"])
@pytest.mark.parametrize("name", CNNS)
def test_cropped_networks_are_dense_run_and_have_the_widths_of_the_plan(name, wider):
    torch.manual_seed(5)
    model = CNNS[name]()
    channels = cnn_channels(model, IMAGE)
    widths = {one: units + 3 if wider else max(1, units // 2) for one, units in channels.widths.items()}
    modules, state = [id(one) for one in model.modules()], torch.get_rng_state()
    applied = crop(model, planned(widths), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(one) for one in model.modules()] == modules
    assert cnn_channels(model, IMAGE).parameters({}) == channels.parameters(widths)
    assert applied.after == sum(one.numel() for one in model.parameters())
    model.train()(images()).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.layout == torch.strided
        assert parameter.grad is not None
    other = CNNS[name]()
    crop(other, planned(widths), seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()) if a.ndim > 1
    )
    third = CNNS[name]()
    crop(third, planned(widths), seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(third.parameters(), other.parameters()))


def test_layers_start_by_their_own_rule_for_their_new_fan_in():
    model = Toy(16, 64, 32, 32)
    crop(model, planned({"b1c1": 16}))
    bound = 1 / (9 * 16) ** 0.5  # torch's: uniform within 1 / sqrt(fan in)
    assert 0.9 * bound < float(model.b1c2.weight.detach().abs().max()) <= bound


def test_plans_that_do_not_fit_change_nothing():
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    plan = planned({"fc": 3, "b1c1": 0, "nowhere": 2})
    with pytest.raises(PlanError) as raised:
        crop(model, plan)
    assert len(raised.value.problems) == 3
    assert "output of the model" in raised.value.problems[0]
    with pytest.raises(PlanError, match="image_size"):
        crop(model, Plan(layers={"b1c1": Resize(channels=3)}))
    with pytest.raises(PlanError, match="nothing else"):
        crop(model, Plan(method={"image_size": "3x8x8"}, layers={"b1c1": Prune(sparsity=0.5)}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Fixed(nn.Module):
    """Runs at its own width alone: it says so in code that no trace sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Sequential(Picky())

    def forward(self, x):
        return self.b(self.act(self.a(x))).mean((2, 3))


class Picky(nn.ReLU):
    __module__ = "torch.nn.picky"  # a leaf of the trace

    def forward(self, x):
        if x.shape[1] != 8:
            raise ValueError("eight, please")
        return super().forward(x)


def test_a_model_that_does_not_run_at_other_widths_is_left_as_it_was():
    model = Fixed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="does not run at the widths of the plan: eight, please"):
        crop(model, planned({"a": 4}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
