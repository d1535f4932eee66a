import pytest

from layerwise.structure import groups_of, structure_of, towers_of
from models import MODELS


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("llama", {"model.layers": 1}),
        ("llava", {"model.vision_tower": 1, "model.language_model": 1}),
        ("blip2", {"vision_model": 1, "qformer": 1, "language_model": 1}),
        ("clip", {"text_model": 1, "vision_model": 1}),
        ("t5", {"encoder": 1, "decoder": 1}),
        ("cifar_resnet", {"layer1": 1, "layer2": 1, "layer3": 1}),
    ],
)
def test_towers_are_where_paths_part(name, towers):
    structure = structure_of(MODELS[name]())
    found = towers_of(structure)
    assert {tower: len(stacks) for tower, stacks in found.items()} == towers
    groups = groups_of(structure, "tower")
    assert list(groups) == list(towers)
    assert [layer.name for layers in groups.values() for layer in layers] == [layer.name for layer in structure]


def test_layers_and_blocks():
    structure = structure_of(MODELS["cifar_resnet"](), include=["*"])
    assert list(groups_of(structure, "layer")) == [layer.name for layer in structure]
    blocks = groups_of(structure, "block")
    assert list(blocks) == [block.name for block in structure.blocks]
    inside = [layer.name for layers in blocks.values() for layer in layers]
    assert [layer.name for layer in structure if layer.name not in inside] == ["conv1", "fc"]


def test_groups_without_layers_are_left_out():
    structure = structure_of(MODELS["llava"](), exclude=["model.vision_tower.*", "model.language_model.layers.0.*"])
    assert list(groups_of(structure, "tower")) == ["model.language_model"]
    assert list(groups_of(structure, "block")) == ["model.language_model.layers.1"]
