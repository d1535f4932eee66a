"""What is a block and what is not, on small modules made for the purpose."""

import pytest
import torch
from torch import Tensor, nn

from layerwise.structure import structure_of
from models import DECODER, MODELS


class Residual(nn.Module):
    """A residual unit; without a norm unless asked for."""

    def __init__(self, width: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.a = nn.Linear(width, 2 * width)
        self.b = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(self.norm(x)).relu())


class Head(nn.Module):
    """Two linears that lead to another width: not residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.norm(x)))


class Experts(nn.Module):
    """A block whose experts are a list of modules, with a linear gate beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(Residual(norm=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return sum(w[..., None] * expert(x) for w, expert in zip(self.gate(x).unbind(-1), self.experts, strict=True))


class Shell(nn.Module):
    """Runs a list of modules one after the other."""

    def __init__(self, *entries: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(entries)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stacks(model: nn.Module) -> dict[str, list[str]]:
    return {stack.name: [block.name for block in stack.blocks] for stack in structure_of(model).stacks}


def test_residual_units_without_norms_are_blocks():
    assert stacks(Shell(Residual(), Residual())) == {"layers": ["layers.0", "layers.1"]}


def test_a_sequential_of_plain_layers_is_no_stack():
    assert stacks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))) == {}


def test_layers_of_a_model_without_blocks_can_be_asked_for():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [layer.name for layer in structure_of(model)] == []
    assert [layer.name for layer in structure_of(model, include=["*"])] == ["0", "2"]


def test_blocks_between_stem_and_head_of_one_sequential():
    model = nn.Sequential(nn.Linear(4, 8), Residual(), Residual(), Residual(), Head())
    assert stacks(model) == {"": ["1", "2", "3"]}


def test_heads_in_a_list_are_no_stack():
    model = Shell(Residual(), Residual())
    model.heads = nn.ModuleList(Head() for _ in range(3))
    assert stacks(model) == {"layers": ["layers.0", "layers.1"]}


def test_experts_in_a_list_are_layers_of_their_block():
    structure = structure_of(Shell(Experts(), Experts()))
    assert [stack.name for stack in structure.stacks] == ["layers"]
    assert [layer.name for layer in structure.blocks[1].layers] == [
        "layers.1.mix",
        *(f"layers.1.experts.{expert}.{layer}" for expert in range(3) for layer in "ab"),
    ]
    assert [(layer.name, layer.role) for layer, _ in structure.left_out] == [
        ("layers.0.gate", "router"),
        ("layers.1.gate", "router"),
    ]


def test_stages_are_looked_into():
    stage = nn.Sequential(Residual(norm=True), Residual(norm=True))
    model = nn.Sequential(stage, nn.Linear(8, 8), nn.Sequential(Residual(norm=True), Residual(norm=True)))
    assert stacks(model) == {"0": ["0.0", "0.1"], "2": ["2.0", "2.1"]}


def test_blocks_of_different_classes_in_one_list():
    assert stacks(Shell(Residual(norm=True), Experts())) == {"layers": ["layers.0", "layers.1"]}


def test_a_list_that_is_only_indexed_has_no_blocks_of_lists():
    model = Shell()
    model.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]) for _ in range(3))
    assert stacks(model) == {}


def test_embeddings_of_each_block_are_no_stack():
    model = Shell(Residual(), Residual())
    model.tables = nn.ModuleList(nn.Embedding(5, 8) for _ in range(2))
    assert stacks(model) == {"layers": ["layers.0", "layers.1"]}


def test_units_of_one_convolution_count_where_there_is_nothing_better():
    def unit() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    assert stacks(nn.Sequential(unit(), unit())) == {"": ["0", "1"]}
    model = Shell(Residual(), Residual())
    model.stem = nn.Sequential(unit(), unit())
    assert stacks(model) == {"layers": ["layers.0", "layers.1"]}


@pytest.mark.parametrize(
    ("model", "config", "settings", "stack"),
    [
        ("LlamaForCausalLM", "LlamaConfig", DECODER, "model.layers"),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "transformer.h"),
        ("BertModel", "BertConfig", {**DECODER}, "encoder.layer"),
        ("T5EncoderModel", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}, "encoder.block"),
    ],
)
def test_a_model_of_one_block(model, config, settings, stack):
    import transformers

    layers = "n_layer" if "n_layer" in settings else "num_layers" if "d_kv" in settings else "num_hidden_layers"
    with torch.device("meta"):
        one = getattr(transformers, model)(getattr(transformers, config)(**{**settings, layers: 1}))
    assert stacks(one) == {stack: [f"{stack}.0"]}


def test_stages_of_one_block_each():
    from models import CifarResNet

    model = CifarResNet(blocks=1)
    assert stacks(model) == {f"layer{stage}": [f"layer{stage}.0"] for stage in (1, 2, 3)}


def test_attention_that_hides_its_inputs_is_left_out_with_a_reason():
    """torch's MultiheadAttention hands its weights to one function; no module sees what they multiply."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    structure = structure_of(nn.TransformerEncoder(layer, 2))
    assert [layer.name for layer in structure.blocks[0].layers] == ["layers.0.linear1", "layers.0.linear2"]
    assert [(layer.name, layer.role) for layer, _ in structure.left_out][:2] == [
        ("layers.0.self_attn.in_proj_weight", "qkv"),
        ("layers.0.self_attn.out_proj", "o"),
    ]
    assert {reason for _, reason in structure.left_out} == {"its module does not show its input"}


def test_a_module_shared_by_two_blocks_is_one_layer():
    model = Shell(Residual(), Residual())
    model.layers[1].a = model.layers[0].a
    structure = structure_of(model)
    assert [layer.name for layer in structure] == ["layers.0.a", "layers.0.b", "layers.1.b"]
    assert structure.layer("layers.0.a").tied == ("layers.1.a.weight",)


def test_a_parameter_shared_by_two_blocks_is_one_layer():
    model = Shell(Residual(), Residual())
    model.layers[1].a.weight = model.layers[0].a.weight
    structure = structure_of(model)
    assert [layer.name for layer in structure] == ["layers.0.a", "layers.0.b", "layers.1.b"]
    assert [(layer.name, reason) for layer, reason in structure.left_out] == [("layers.1.a", 'tied to "layers.0.a"')]


def test_parameters_count_tied_tensors_once():
    model = MODELS["qwen2"]()
    hidden, kv, vocab, wide = 32, 16, 96, 64
    # q, k, v with biases, o, three of the MLP, two norms
    block = hidden * (hidden + 1) + 2 * kv * (hidden + 1) + hidden * hidden + 3 * hidden * wide + 2 * hidden
    assert structure_of(model).parameters == 2 * block + vocab * hidden + hidden


def test_fingerprint_knows_names_and_shapes_not_values_or_ties():
    model = Shell(Residual(), Residual())
    before = structure_of(model).fingerprint
    with torch.no_grad():
        model.layers[0].a.weight.zero_()
    assert structure_of(model).fingerprint == before
    model.layers[1].a.weight = model.layers[0].a.weight
    assert structure_of(model).fingerprint == before
    assert structure_of(Shell(Residual(), Residual(4))).fingerprint != before
    assert before.startswith("sha256:")
    assert len(before) == len("sha256:") + 64
