"""PreCrop and PreConfig from model to plan to network: budgets, sources, residual streams, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnns import CNNS, IMAGE, Toy, UNet
from layerwise.errors import BudgetError, ConfigError, DataError, ModelError
from layerwise.methods import METHODS, PreConfig, PreCrop
from layerwise.plan import Plan
from layerwise.shrink import crop, widths_in
from layerwise.structure import cnn_channels, structure_of
from layerwise.tasks.batches import Batches

NAMES = {"stem": "A", "b1c1": "B", "b2c1": "C", "proj": "D"}
BIG = "3x32x32"


def data(labels=True, size=8):
    images = torch.randn(20, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batches(({"pixel_values": images, **({"labels": torch.arange(20) % 10} if labels else {})},), {})


def widths(method, model=None, given=None):
    model = model or Toy()
    plan = method.plan(model, given)
    found = widths_in(plan, cnn_channels(model, tuple(int(one) for one in plan.method["image_size"].split("x"))))
    return tuple(found[name] for name in NAMES) if {*found} == {*NAMES} else found


def test_half_of_the_toy_network():
    assert widths(PreCrop(macs=None, image_size=BIG)) == (16, 16, 9, 32)
    assert widths(PreCrop(image_size=BIG)) == (16, 7, 15, 32)
    plan = PreCrop(image_size=BIG).plan(Toy())
    assert {name: entry.resize.channels for name, entry in plan.layers.items()} == {
        "b1c1": 7,
        "b2c1": 15,
    }  # what changes
    assert "9,760 of 19,696 weights (49.55%) and 4,297,024 of 8,831,296 multiply-adds (48.66%)" in plan.notes[0]
    assert (plan.budget.parameters, plan.budget.flops) == (9848, 8_831_296)
    assert plan.model.parameters == 19_696
    assert Plan.from_text(plan.to_yaml()) == plan


def test_budgets_at_full_width_change_nothing_and_preconfig_moves_channels_under_its_cap():
    assert PreCrop(parameters=1.0, macs=1.0, image_size=BIG).plan(Toy()).layers == {}
    got = widths(PreConfig(image_size=BIG))
    assert got[0] > 16
    assert all(one <= 2 * full for one, full in zip(got, (16, 16, 32, 32)))
    degenerate = widths(PreConfig(max_ratio=50.0, image_size=BIG))
    assert degenerate[0] > 50
    assert degenerate[3] > 90
    assert max(degenerate[1:3]) < 8
    assert widths(PreConfig(max_ratio=1.0, image_size=BIG)) == (16, 16, 32, 32)


def test_inside_leaves_the_residual_streams():
    got = widths(PreCrop(parameters=0.3, macs=None, residual="inside", image_size=BIG))
    assert (got[0], got[3]) == (16, 32)
    with pytest.raises(BudgetError, match="cannot be met"):
        PreCrop(parameters=0.05, macs=None, residual="inside", image_size=BIG).plan(Toy())
    assert widths(PreCrop(parameters=0.05, macs=None, image_size=BIG))[0] < 16


def test_least_widths_and_multiples():
    got = widths(PreCrop(parameters=0.4, macs=None, min_channels=6, multiple_of=4, image_size=BIG))
    assert all(one % 4 == 0 and one >= 8 for one in got)
    assert widths(PreCrop(parameters=0.2, macs=None, min_channels=3, image_size=BIG))[2] >= 3


@pytest.mark.parametrize("source", ["synflow", "snip", "grasp", "erk"])
def test_scorers_give_densities_that_groups_share(source):
    model = Toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = PreCrop(macs=None, source=source)
    plan = method.plan(model, data())
    assert {*plan.scores} == {"stem", "b1c1", "b1c2", "b2c1", "b2c2", "proj", "fc"}
    sizes = {layer.name: layer.size for layer in structure_of(model, include=["*"])}
    assert sum(plan.scores[name] * size for name, size in sizes.items()) / 19_696 == pytest.approx(0.5, abs=1e-3)
    channels = cnn_channels(model, IMAGE)
    kept = channels.parameters(widths_in(plan, channels))
    assert 0.45 * 19_696 < kept <= 9848
    assert plan.to_yaml() == method.plan(model, data()).to_yaml()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["synflow", "erk"])
def test_scorers_leave_transposed_convolutions_out(source):
    with pytest.raises(ModelError, match=rf'source="{source}" gives no density to "last".* Give source="synexp"'):
        PreCrop(macs=None, source=source, image_size="3x8x8").plan(UNet())


def test_synflow_needs_no_data_snip_does():
    assert widths(PreCrop(source="synflow", image_size="3x8x8")) == widths(PreCrop(source="synflow"), given=data(False))
    with pytest.raises(DataError, match="PreCrop looks at batches"):
        PreCrop(source="snip", image_size="3x8x8").plan(Toy())


@pytest.mark.parametrize("name", CNNS)
@given(share=st.floats(0.35, 1.0), other=st.floats(0.35, 1.2), wider=st.booleans())
@settings(max_examples=2, deadline=None)
def test_built_networks_hold_both_budgets(name, share, other, wider):
    """Check 8, on every network: exact counts, forward and backward, dense, the same modules, the same twice."""
    torch.manual_seed(0)
    model = CNNS[name]()
    channels = cnn_channels(model, IMAGE)
    if wider:
        method = PreConfig(parameters=share, macs=other, image_size="3x8x8")
    else:
        method = PreCrop(parameters=share, macs=min(1.0, other), image_size="3x8x8")
    try:
        plan = method.plan(model)
    except BudgetError:  # what never changes costs more
        least = dict.fromkeys(channels.widths, 1)
        assert channels.parameters(least) > share * channels.parameters({}) or channels.multiply_adds(least) > min(
            other, 1.0 if not wider else other
        ) * channels.multiply_adds({})
        return
    assert method.plan(model).to_yaml() == plan.to_yaml()
    modules = sum(1 for _ in model.modules())
    crop(model, plan)
    assert sum(1 for _ in model.modules()) == modules
    built = cnn_channels(model, IMAGE)
    assert built.parameters({}) == sum(one.numel() for one in model.parameters() if one.ndim > 1)
    assert built.parameters({}) <= method.parameters * channels.parameters({}) + 1e-6
    assert built.multiply_adds({}) <= method.macs * channels.multiply_adds({}) + 1e-6
    model.train()(torch.randn(2, *IMAGE)).sum().backward()
    assert all(one.grad is not None and one.layout == torch.strided for one in model.parameters())


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"parameters": None, "macs": None}, "parameters, macs or both"),
        ({"parameters": 1.5}, "PreCrop.parameters=1.5"),
        ({"macs": 0.0}, "PreCrop.macs=0"),
        ({"source": "wanda"}, 'source="wanda"'),
        ({"residual": "crop"}, 'residual="crop"'),
        ({"multiple_of": 0}, "at least 1"),
        ({"image_size": "32"}, 'image_size="32"'),
        ({"image_size": "3x-1x4"}, "image_size"),
    ],
)
def test_bad_settings(bad, word):
    with pytest.raises(ConfigError, match=word):
        PreCrop(**bad)


def test_other_bad_requests():
    with pytest.raises(ConfigError, match=r"max_ratio=0\.5"):
        PreConfig(max_ratio=0.5)
    with pytest.raises(DataError, match="image_size"):
        PreCrop().plan(Toy())
    with pytest.raises(DataError, match="no pixel_values"):
        PreCrop().plan(Toy(), Batches(({"input_ids": torch.zeros(2, 3)},), {}))
    with pytest.raises(ModelError, match="no group of channels"):
        PreCrop(image_size="3x8x8").plan(torch.nn.Conv2d(3, 4, 3))
    assert "precrop" not in METHODS  # not for the command line: see methods/__init__.py
