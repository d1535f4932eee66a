"""Channels that belong together, read from a trace: worked by hand for each way of joining, and refused where it cannot be told."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cnns import CNNS, IMAGE, DenseNet, Halves, MobileNet, OptionA, Shuffle, SqueezeExcite, Toy, UNet
from layerwise.errors import ModelError
from layerwise.shrink import shrink_channels, zero_channels
from layerwise.structure import cnn_channels
from layerwise.structure.channel_layout import cut_at, new, repeated, resolved, tie, width
from layerwise.structure.cnn_channels import Run


def layer(channels, name):
    return next(one for one in channels.layers if one.name == name)


def test_the_toy_network_of_the_specification():
    channels = cnn_channels(Toy(), (3, 32, 32))
    assert channels.widths == {"stem": 16, "b1c1": 16, "proj": 32, "b2c1": 32}
    assert [group.name for group in channels.groups if group.residual] == ["stem", "proj"]
    assert channels.parameters({}) == 19_696 == sum(one.numel() for one in Toy().parameters())
    assert channels.multiply_adds({}) == 8_831_296
    half = {"stem": 16, "b1c1": 16, "b2c1": 9, "proj": 32}
    assert channels.parameters(half) == 9760
    assert channels.parameters({"b1c1": 7, "b2c1": 15}) == 9760
    assert channels.multiply_adds({"b1c1": 7, "b2c1": 15}) == 4_297_024
    assert dict(channels.left) == {"fc": "it is an output of the model"}


def test_zero_padded_shortcut_is_the_stage_before_and_what_is_put_beside_it():
    channels = cnn_channels(OptionA(8), IMAGE)
    assert channels.widths == {"stem": 8, "c1": 8, "d1": 16}  # d2 has no width of its own: 4 + stem + 4
    assert layer(channels, "d2").outputs == (Run(None, 4), Run("stem", 8), Run(None, 4))
    assert channels.sizes(layer(channels, "fc"), {"stem": 5}) == (13, 10)


def test_concatenation_adds_widths():
    channels = cnn_channels(DenseNet(), IMAGE)
    assert channels.sizes(layer(channels, "convs.2"), {"stem": 2, "convs.0": 1, "convs.1": 3}) == (6, 6)


def test_depthwise_is_counted_once_and_squeeze_and_excite_is_of_its_tensor():
    channels = cnn_channels(MobileNet(SqueezeExcite), IMAGE)
    depth = layer(channels, "blocks.0.depth")
    assert (depth.kind, depth.inputs, depth.outputs) == ("depthwise", depth.outputs, (Run("blocks.0.expand", 16),))
    assert depth.weights(8, 8) == 9 * 8
    assert layer(channels, "blocks.0.excite.up").outputs == (Run("blocks.0.expand", 16),)
    assert layer(channels, "blocks.0.excite.down").outputs == (Run("blocks.0.excite.down", 4),)


def test_flattened_maps_give_every_channel_its_positions():
    assert layer(cnn_channels(CNNS["flat"](), IMAGE), "f1").inputs == (Run("c2", 10, 16),)
    assert layer(cnn_channels(CNNS["flat-nhwc"](), IMAGE), "f1").inputs == (Run("c2", 10),) * 16
    hard = cnn_channels(CNNS["flat-hard"](), IMAGE)
    assert "c2" not in hard.widths
    assert dict(hard.left)["c2"] == "the code gives its size as a number"


@pytest.mark.parametrize("kind", ["flat", "flat-nhwc"])
def test_flattened_maps_of_one_channel(kind):
    """As a small budget leaves them: last, the channel is a dimension of one that the flattening swallows."""
    model = CNNS[kind]()
    model.c2, model.f1 = nn.Conv2d(6, 1, 3, 1, 1), nn.Linear(16, 12)
    channels = cnn_channels(model, IMAGE)
    assert channels.widths["c2"] == 1
    assert channels.sizes(layer(channels, "f1"), {"c2": 3}) == (48, 12)


def test_shuffle_keeps_widths_divisible_and_numbers_in_the_code_hold_them():
    channels = cnn_channels(Shuffle(), IMAGE)
    assert channels.widths == {"stem": 8, "g1": 2}  # channels of each group; those of g1 are in both halves of each
    assert layer(channels, "g1").outputs == (Run("g1", 2),) * 4
    assert layer(channels, "depth").outputs == (Run("g1", 2, 2),) * 2
    assert "g1" not in cnn_channels(Shuffle(computed=False), IMAGE).widths


def test_chunks_are_equal_halves_slices_by_number_stay():
    assert layer(cnn_channels(Halves(), IMAGE), "stem").outputs == (Run("stem", 6),) * 2
    sliced = cnn_channels(Halves("slices"), IMAGE)
    assert layer(sliced, "stem").outputs == (Run(None, 6), Run("stem", 6))
    assert "stem" not in cnn_channels(Halves("split"), IMAGE).widths


def test_depthwise_with_a_multiplier_writes_two_for_each():
    assert layer(cnn_channels(CNNS["multiplied"](), IMAGE), "last").inputs == (Run("stem", 6, 2),)


def test_a_transposed_convolution_multiplies_once_for_each_input():
    model = UNet()
    channels = cnn_channels(model, IMAGE)
    assert channels.widths == {"a": 6, "down": 10, "up": 5}
    up, last = (layer(channels, name) for name in ("up", "last"))
    assert (up.inputs, up.outputs) == ((Run("down", 10),), (Run("up", 5),))
    assert last.inputs == (Run("a", 6), Run("up", 5))
    assert up.weights(10, 5) == model.up.weight.numel() == 9 * 10 * 5
    assert up.multiply_adds(10, 5) == 450 * 4 * 4  # the maps before it, not the 8 x 8 behind
    assert last.multiply_adds(11, 2) == 4 * 11 * 2 * 8 * 8


class Ends(nn.Module):
    """A convolution, something in the middle, and a head."""

    def __init__(self, middle, back=8):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(back, 4, 1)
        self.middle = middle if isinstance(middle, nn.Module) else None
        self.f = middle

    def forward(self, x):
        return self.b(self.f(self.a(x))).mean((2, 3))


class Gamma(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    ("middle", "word"),
    [
        (lambda x: x.cumsum(1), '"cumsum".*cumsum has no rule'),
        (lambda x: x[:, torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])], "by tensors"),
        (lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1), "reduces over channels"),
        (lambda x: x.roll(1, 1), "roll has no rule"),
        (nn.ConvTranspose2d(8, 8, 1, groups=2), '"middle".*ConvTranspose2d in groups has no rule'),
        (nn.ChannelShuffle(2), "ChannelShuffle has no rule"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be traced"),
        (lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)), "has no rule|does not run"),
    ],
)
def test_what_is_not_known_is_refused_by_name(middle, word):
    with pytest.raises(ModelError, match=word) as caught:
        cnn_channels(Ends(middle), IMAGE)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (Gamma(), "a tensor of the model's own lies along it"),
        (lambda x: x.reshape(-1, 4, 2, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8), "as a number"),
        (lambda x: x * x[:, 3].unsqueeze(1), "single channels are taken by number"),
        (nn.LayerNorm([8, 8, 8]), "normalises whole maps"),
        (lambda x: torch.softmax(x, 1), "softmax mixes its channels"),
        (nn.Softmax2d(), "softmax mixes its channels"),
    ],
)
def test_what_cannot_be_followed_stays_whole_with_the_reason(middle, why):
    channels = cnn_channels(Ends(middle), IMAGE)
    assert "a" not in channels.widths
    assert why in dict(channels.left)["a"]


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize(
    "end",
    [
        lambda x: F.log_softmax(x, dim=1),
        lambda x: F.softmax(x, -1),
        lambda x: x.softmax(1),
        nn.Softmax(dim=1),
        nn.LogSoftmax(dim=-1),
        nn.Softmax(),
    ],
)
def test_softmax_of_the_outputs_changes_nothing(end):
    class Ending(Ends):
        def forward(self, x):
            return self.middle(self.b(self.a(x)).mean((2, 3))) if self.middle else end(super().forward(x))

    model = Ending(end) if isinstance(end, nn.Module) else Ending(F.relu)
    channels = cnn_channels(model, IMAGE)
    assert channels.widths == {"a": 8}
    assert "it is an output of the model" in dict(channels.left)["b"]


@torch.no_grad()
@pytest.mark.parametrize(
    "middle",
    [
        nn.SELU(),
        F.selu,
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(8, affine=True),
        nn.InstanceNorm2d(8),
        lambda x: x.flatten(2).softmax(2).unflatten(2, (8, 8)),
    ],
)
def test_each_channel_s_own_goes_with_it(middle):
    model = Ends(middle).eval()
    channels = cnn_channels(model, IMAGE)
    assert channels.widths == {"a": 8}
    zeroed = copy.deepcopy(model)
    zero_channels(zeroed, {"a": [0, 3, 4]}, channels)
    shrink_channels(model, {"a": [0, 3, 4]}, channels)
    x = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), zeroed(x))


def test_group_norm_ties_its_groups_and_pixel_shuffle_its_squares():
    assert layer(cnn_channels(Ends(nn.GroupNorm(2, 8)), IMAGE), "a").outputs == (Run("a", 4),) * 2
    assert layer(cnn_channels(Ends(nn.PixelShuffle(2), back=2), IMAGE), "a").outputs == (Run("a", 2, 4),)


def test_a_layer_called_twice_reads_and_writes_one_width():
    conv = nn.Conv2d(8, 8, 3, 1, 1)
    channels = cnn_channels(Ends(nn.Sequential(conv, conv)), IMAGE)
    assert layer(channels, "middle.0").inputs == layer(channels, "middle.0").outputs == (Run("a", 8),)
    assert layer(channels, "middle.0").positions == 2 * 64


def test_shared_and_parametrized_weights_are_refused():
    model = Ends(nn.Conv2d(8, 8, 1))
    nn.utils.parametrizations.weight_norm(model.middle)
    with pytest.raises(ModelError, match=r'"middle".*parametrized'):
        cnn_channels(model, IMAGE)
    model = Ends(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)))
    model.middle[1].weight = model.middle[0].weight
    with pytest.raises(ModelError, match="share one weight"):
        cnn_channels(model, IMAGE)


@pytest.mark.parametrize("image", [(), (3, 0, 8), (4, 8, 8)])
def test_images_that_the_model_does_not_take(image):
    with pytest.raises(ModelError, match="image"):
        cnn_channels(Toy(), image)


@pytest.mark.parametrize("name", CNNS)
def test_the_model_is_untouched_and_counts_are_its_own(name):
    model = CNNS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    channels = cnn_channels(model, IMAGE)
    assert channels == cnn_channels(model, IMAGE)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert channels.parameters({}) == sum(one.numel() for one in weights)


# -- the algebra


@st.composite
def layouts(draw):
    """Two layouts of one width, of runs with inner counts and repeats."""

    def one():
        parts = draw(
            st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3)
        )
        return tuple(run for size, inner, times in parts for run in repeated(new(size), inner, times))

    a, b = one(), one()
    total = max(width(a), width(b))
    return tuple((*found, *new(total - width(found))) if width(found) < total else found for found in (a, b))


def labels(layout):
    """What every channel belongs to: (variable, unit)."""
    return [
        (id(variable), unit)
        for variable, inner in resolved(layout)
        for unit in range(variable.size)
        for _ in range(inner)
    ]


@given(layouts())
def test_tied_layouts_read_the_same_or_never_change(pair):
    a, b = pair
    total = width(a)
    tie(a, b)
    assert width(a) == width(b) == total
    assert labels(a) == labels(b) or all(variable.fixed for variable, _ in (*resolved(a), *resolved(b)))


@given(layouts(), st.data())
def test_cutting_keeps_what_is_on_both_sides(pair, data):
    a, _ = pair
    at = data.draw(st.integers(0, width(a)))
    found = cut_at(a, at)
    if found:
        assert (width(found[0]), width(found[1])) == (at, width(a) - at)
        assert labels(found[0]) + labels(found[1]) == labels(a)
