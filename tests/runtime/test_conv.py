"""Convolutions without their zero channels: exact, and only where a whole channel is zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.runtime import NarrowConv2d
from layerwise.runtime.candidates import for_convolution


def pruned(outputs, inputs, gone_outputs, gone_inputs, *, bias=True, **settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, bias=bias, dtype=torch.float64, **settings)
    conv.weight.data[list(gone_outputs)] = 0
    conv.weight.data[:, list(gone_inputs)] = 0
    return conv.requires_grad_(False)


@given(
    gone_outputs=st.sets(st.integers(0, 4)),
    gone_inputs=st.sets(st.integers(0, 2)),
    bias=st.booleans(),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "circular"]),
    alone=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_exact_in_float64(gone_outputs, gone_inputs, bias, stride, padding, mode, alone):
    stride = 1 if padding == "same" else stride
    conv = pruned(5, 3, gone_outputs, gone_inputs, bias=bias, stride=stride, padding=padding, padding_mode=mode)
    x = torch.randn(*(() if alone else (2,)), 3, 8, 7, dtype=torch.float64)
    made = NarrowConv2d(conv)
    torch.testing.assert_close(made(x), conv(x), rtol=1e-12, atol=1e-12)
    state, plain = nn.Sequential(made).state_dict(), nn.Sequential(conv).state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_only_whole_channels_of_one_group():
    dense = for_convolution(nn.Conv2d(4, 4, 3))
    assert not dense.builds
    assert dense.refused["narrow"] == "no channel is all zero"
    assert "only whole channels" in dense.refused["csr"]
    grouped = for_convolution(pruned(4, 4, [1], [], groups=2))
    assert grouped.refused["narrow"] == "it has 2 groups"
    narrow = for_convolution(pruned(4, 4, [1, 2], [0]))
    assert narrow.looks == "37.5% kept, 2 output channels zero, 1 input channels zero"
    assert narrow.builds["narrow"]().small[0].weight.shape == (2, 3, 3, 3)


def test_it_says_what_it_computes():
    assert repr(NarrowConv2d(pruned(4, 3, [1], []))) == (
        "NarrowConv2d(3, 4, kernel_size=(3, 3), 3 outputs and 3 inputs computed)"
    )


def test_what_it_stores():
    made = NarrowConv2d(pruned(4, 3, [1], []))
    assert made.bytes == (3 * 3 * 9 + 3) * 8
    with pytest.raises(AttributeError):
        _ = made.missing


def test_under_autocast_it_computes_in_its_own_dtype():
    conv = pruned(6, 4, {1, 4}, {2})
    x = torch.randn(2, 4, 5, 5, dtype=conv.weight.dtype)
    conv, x = conv.float(), x.float()
    narrow = NarrowConv2d(conv)
    alone = narrow(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow(x), alone.bfloat16())
        assert conv(x).dtype == torch.bfloat16
