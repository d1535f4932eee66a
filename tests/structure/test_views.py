"""Matrices of (outputs, inputs) from every kind of weight, and the order of experts."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerwise.errors import ModelError, ShapeError
from layerwise.structure import Layer, as_matrices, from_matrices, module_of, parameter_of, structure_of


def only_layer(model: nn.Module, pattern: str = "*") -> Layer:
    (layer,) = structure_of(model, include=[pattern])
    return layer


class Fused(nn.Module):
    """Experts in one tensor; attributes as given."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **attributes: object) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 3),
    inputs=st.integers(1, 3),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
)
def test_convolution_as_matrices_of_unfolded_inputs(groups, outputs, inputs, kernel):
    torch.manual_seed(0)
    convolution = nn.Conv2d(groups * inputs, groups * outputs, kernel, groups=groups, bias=False).double()
    layer = only_layer(nn.Sequential(convolution))
    assert (layer.matrices, layer.rows, layer.columns) == (groups, outputs, inputs * kernel[0] * kernel[1])

    x = torch.randn(2, groups * inputs, 4, 5, dtype=torch.float64)
    windows = nn.functional.unfold(x, kernel).reshape(2, groups, layer.columns, -1)
    y = torch.einsum("grc,ngcl->ngrl", as_matrices(convolution.weight, layer), windows)
    torch.testing.assert_close(y.reshape(convolution(x).shape), convolution(x))
    assert torch.equal(from_matrices(as_matrices(convolution.weight, layer), layer), convolution.weight)


@pytest.mark.parametrize("convolution", [nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(4, 6, (1, 2, 3), groups=2)])
def test_convolutions_of_other_dimensions(convolution):
    layer = only_layer(nn.Sequential(convolution))
    assert (layer.kind, layer.matrices, layer.rows) == ("conv", 2, 3)
    assert torch.equal(from_matrices(as_matrices(convolution.weight, layer), layer), convolution.weight)


def test_views_share_memory_with_the_weight():
    model = nn.Sequential(nn.Linear(3, 2))
    layer = only_layer(model)
    as_matrices(parameter_of(model, layer).data, layer)[0, 1, 2] = 7.0
    assert model[0].weight[1, 2] == 7


def test_wrong_shapes_are_refused_by_name():
    layer = only_layer(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ShapeError, match=r'"0".*\(2, 3\).*\(3, 2\)'):
        as_matrices(torch.zeros(3, 2), layer)
    with pytest.raises(ShapeError, match=r'"0".*\(1, 2, 3\).*\(2, 3\)'):
        from_matrices(torch.zeros(2, 3), layer)


def test_a_layer_of_another_model_is_refused():
    layer = only_layer(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ModelError, match=r'"0".*no parameter "0.weight"'):
        parameter_of(nn.ModuleDict({"a": nn.Linear(3, 2)}), layer)
    with pytest.raises(ModelError, match=r'"0".*no such module'):
        module_of(nn.ModuleDict({"a": nn.Linear(3, 2)}), layer)
    with pytest.raises(ModelError, match=r'"0".*\(4, 3\)'):
        parameter_of(nn.Sequential(nn.Linear(3, 4)), layer)


@pytest.mark.parametrize(
    ("experts", "seen"),
    [
        # the flag wins, even where the shapes say nothing
        (Fused({"gate_up_proj": (2, 8, 8)}, num_experts=2, is_transposed=True), ("gate_up_proj", 8, 8, True)),
        (Fused({"gate_up_proj": (2, 8, 8)}, num_experts=2, is_transposed=False), ("gate_up_proj", 8, 8, False)),
        # a gated pair shows it without any other fact: hidden 8, 4 wide, so that gate_up is square
        (Fused({"gate_up_proj": (2, 8, 8), "down_proj": (2, 4, 8)}, num_experts=2), ("gate_up_proj", 8, 8, True)),
        (Fused({"gate_up_proj": (2, 8, 8), "down_proj": (2, 8, 4)}, num_experts=2), ("gate_up_proj", 8, 8, False)),
        # separate parts need the hidden size
        (Fused({"up_proj": (2, 8, 4), "down_proj": (2, 4, 8)}, num_experts=2, hidden_size=8), ("up_proj", 4, 8, True)),
        (Fused({"up_proj": (2, 8, 4), "down_proj": (2, 4, 8)}, num_experts=2, hidden_size=4), ("up_proj", 8, 4, False)),
        (Fused({"w2": (2, 8, 4)}, n_experts=2, hidden_dim=8), ("w2", 8, 4, False)),
        (Fused({"w2": (2, 8, 4)}, n_experts=2, hidden_dim=4), ("w2", 4, 8, True)),
        # sizes that the module states
        (Fused({"weight": (2, 8, 4)}, num_experts=2, input_size=4, output_size=8), ("weight", 8, 4, False)),
        (Fused({"weight": (2, 8, 4)}, num_experts=2, input_size=8, output_size=4), ("weight", 4, 8, True)),
    ],
)
def test_order_of_experts(experts, seen):
    name, rows, columns, transposed = seen
    model = nn.ModuleDict({"experts": experts})
    layer = next(iter(structure_of(model)), None) or structure_of(model, include=["*"]).outside[0]
    assert layer.parameter == f"experts.{name}"
    assert (layer.matrices, layer.rows, layer.columns, layer.transposed) == (2, rows, columns, transposed)
    weight = torch.arange(float(layer.size)).reshape(layer.shape)
    assert torch.equal(from_matrices(as_matrices(weight, layer), layer), weight)


def test_order_of_square_experts_is_taken_from_their_like():
    square = Fused({"weight": (2, 8, 8)}, num_experts=2, input_size=8, output_size=8)
    wide = Fused({"weight": (2, 8, 4)}, num_experts=2, input_size=8, output_size=4)
    model = nn.ModuleDict({"square": square, "wide": wide})
    assert only_layer(model, "square").transposed


def test_order_of_experts_that_know_no_size_is_taken_from_the_config_of_the_model():
    model = nn.ModuleDict({"experts": Fused({"gate_proj": (2, 4, 8), "down_proj": (2, 8, 4)})})
    model["experts"].num_experts = 2
    model.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=8))
    layers = list(structure_of(model, include=["*"]))
    assert [(layer.rows, layer.columns, layer.transposed) for layer in layers] == [(4, 8, False), (8, 4, False)]


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [("up_proj", (2, 8, 8), 8), ("up_proj", (2, 8, 4), 16), ("mystery", (2, 8, 4), 8)],
    ids=["square", "neither axis", "unknown side"],
)
def test_undecidable_order_of_experts_is_an_error_that_says_what_to_do(name, shape, hidden):
    model = nn.ModuleDict({"experts": Fused({name: shape}, num_experts=2, hidden_size=hidden)})
    with pytest.raises(ModelError, match=rf"{name}.*{re.escape(str(shape))}.*is_transposed"):
        structure_of(model)
