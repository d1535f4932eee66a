"""Blocks that the calibration data never comes to stay whole: nothing is known of them."""

import pytest
import torch

from layerwise.errors import BudgetError, DataError, ModelError
from layerwise.methods import method_from
from layerwise.methods.adapt_pruner import Schedule
from layerwise.passes import reached_blocks
from layerwise.scores import block_influence
from layerwise.shrink import apply
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, TOKENS, VOCAB, inputs_for

SETTINGS = {
    "adapt-pruner": {"step": 0.1, "amplitude": 0.05},
    "llm-pruner": {"first_whole": 0.0, "last_whole": 0.0},
    "flap": {},
}
NOTE = "4 left whole: no batch comes to 2 of 2 blocks of model.vision_tower.encoder.layers."


def words(count=2):
    """Text without images."""
    draw = torch.Generator().manual_seed(0)
    return Batches(tuple({"input_ids": torch.randint(4, VOCAB, (2, TOKENS), generator=draw)} for _ in range(count)), {})


@pytest.mark.parametrize("name", SETTINGS)
def test_text_alone_leaves_the_vision_tower_of_a_llava_whole(name):
    model = MODELS["llava"]()
    total = sum(one.numel() for one in model.parameters())
    vision = [one.shape for one in model.model.vision_tower.parameters()]
    plan = method_from(name, parameters=0.9, **SETTINGS[name]).plan(model, words())
    assert NOTE in plan.notes
    assert plan.layers
    assert all(name.startswith("model.language_model") for name in plan.layers)
    assert apply(model, plan, words()).after <= int(0.9 * total)
    assert [one.shape for one in model.model.vision_tower.parameters()] == vision


@pytest.mark.parametrize("name", SETTINGS)
def test_one_batch_with_images_is_enough(name):
    model = MODELS["llava"]()
    batches = Batches((*words(), inputs_for("llava", model)), {})
    plan = method_from(name, parameters=0.8, **SETTINGS[name]).plan(model, batches)
    assert NOTE not in plan.notes
    assert any(name.startswith("model.vision_tower") for name in plan.layers)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_others_cannot_give_is_an_error_that_says_why(name):
    model = MODELS["llava"]()
    with pytest.raises(BudgetError, match=r"is the least.*no batch comes to 2 of 2 blocks of model\.vision_tower"):
        method_from(name, parameters=0.62, **SETTINGS[name]).plan(model, words())
    without = structure_of(model, exclude=["*language_model*"])
    with pytest.raises(ModelError, match="nothing can be cut: no batch comes to"):
        method_from(name, parameters=0.9, **SETTINGS[name]).plan(model, words(), structure=without)


def test_a_step_that_looks_at_text_alone_is_an_error():
    """Where others come to the vision tower: its scores in that step would all be zero."""
    model = MODELS["llava"]()
    batches = Batches((*(inputs_for("llava", model, seed=seed) for seed in range(2)), *words()), {})
    method = method_from("adapt-pruner", parameters=0.8, batches=2, **SETTINGS["adapt-pruner"])
    with pytest.raises(DataError, match=r"none of 2 batches from number 2 on comes to \"model\.vision_tower"):
        method.plan(model, batches)


def test_blocks_without_a_cosine_are_not_in_the_schedule(monkeypatch):
    """Those that change the shape of what goes through them."""
    monkeypatch.setattr(
        "layerwise.methods.adapt_pruner.block_influence",
        lambda *given: {k: v for k, v in block_influence(*given).items() if k != "model.layers.0"},
    )
    model = MODELS["llama"]()
    batches, schedule = Batches((inputs_for("llama", model),), {}), Schedule.of(model)
    plan = method_from("adapt-pruner", parameters=0.9, step=0.1).plan(model, batches, schedule=schedule)
    assert plan.layers
    assert all(name.startswith("model.layers.1.") for name in plan.layers)
    assert "2 left whole: no cosine compares what enters and leaves 1 of 2 blocks of model.layers." in plan.notes
    assert [*schedule.sparsities] == ["model.layers.1"]


def test_passes_end_with_the_batch_that_comes_to_the_last_block():
    model, calls = MODELS["llava"](), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    structure, image = structure_of(model), inputs_for("llava", model)
    language = {block.name for block in structure.blocks if "language" in block.name}
    assert reached_blocks(model, structure, words(3)) == language
    assert len(calls) == 3
    assert reached_blocks(model, structure, [image, *words(3)]) == {block.name for block in structure.blocks}
    assert len(calls) == 4
