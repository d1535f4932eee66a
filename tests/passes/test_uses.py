"""How often weights multiply, against PyTorch's own counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerwise.errors import WalkError
from layerwise.passes import uses_of
from layerwise.structure import structure_of
from models import MODELS, inputs_for


def test_deit_base_distilled():
    """16.934 G multiply-adds in weights; with the attention products, 0.723 G, what PyTorch counts. Nothing is computed (meta device)."""
    import transformers

    config = transformers.DeiTConfig(num_labels=1000, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
        image = {"pixel_values": torch.empty(2, 3, 224, 224)}
    structure = structure_of(model, include=["*"])
    uses = uses_of(model, structure, image)
    macs = sum(uses[layer.name] * layer.size for layer in structure)
    assert macs == pytest.approx(16.934e9, rel=1e-4)
    attention = 12 * 2 * 198**2 * 768
    assert attention == pytest.approx(0.723e9, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model(**image)
    assert counter.get_total_flops() == 2 * 2 * (round(macs) + attention)  # two images, a multiply and an add each
    assert uses["deit.embeddings.patch_embeddings.projection"] == 196
    assert {uses[layer.name] for layer in structure if layer.role == "fc1"} == {198}
    heads = [layer.name for layer in structure if layer.rows == 1000]
    assert [uses[name] for name in heads] == [1, 1]


@pytest.mark.parametrize("name", ["swin", "convnext", "cifar_resnet", "timm_vit", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_times_sizes_they_are_the_operations_pytorch_counts(name, batch):
    """But for attention products, which are those of two activations."""
    model = MODELS[name]()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    structure = structure_of(model, include=["*"], exclude=["*.wte"] if name == "gpt2" else [])  # tied to the head
    inputs = inputs_for(name, model, batch=batch)
    uses = uses_of(model, structure, inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    weights = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    assert weights == 2 * batch * sum(uses[layer.name] * layer.size for layer in structure)


def test_fused_experts_count_the_tokens_that_came_to_them():
    """12 tokens to 2 of 4 experts each: 6 a matrix."""
    model = MODELS["mixtral"]()
    structure = structure_of(model)
    uses = uses_of(model, structure, inputs_for("mixtral", model, batch=2))
    assert {uses[layer.name] for layer in structure if layer.kind == "experts"} == {6.0}
    assert {uses[layer.name] for layer in structure if layer.role == "q"} == {12.0}


def test_the_model_is_left_alone_and_bad_batches_are_said():
    model = MODELS["timm_vit"]().train()
    structure = structure_of(model)
    uses_of(model, structure, inputs_for("timm_vit", model))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(WalkError, match="cannot run on batch 0"):
        uses_of(model, structure, {"pixel_values": torch.zeros(1, 2, 16, 16)})
