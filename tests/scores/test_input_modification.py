import pytest
import torch

from layerwise.errors import ModelError, ScoreError
from layerwise.scores import SCORES, block_influence, input_modification, negative_cosine
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def test_worked_by_hand():
    x = torch.tensor([[3.0, 4], [1, -2]])
    assert negative_cosine(x, x) == pytest.approx(-1, abs=1e-6)
    assert negative_cosine(x, 2 * x) == pytest.approx(-1, abs=1e-6)
    assert negative_cosine(x, torch.tensor([[-4.0, 3], [2, 1]])) == pytest.approx(0, abs=1e-6)
    assert negative_cosine(x, -x) == pytest.approx(1, abs=1e-6)


def test_every_token_counts_the_same_whatever_its_norm():
    before, after = torch.tensor([[1.0, 0], [0, 10]]), torch.tensor([[0.0, 1], [0, 10]])
    assert negative_cosine(before, after) == pytest.approx(-0.5)
    flat = -torch.cosine_similarity(before.flatten(), after.flatten(), dim=0).item()
    assert flat == pytest.approx(-0.990099, abs=1e-6)  # what it would be of all tokens in one vector


def test_half_precision_is_measured_in_float32():
    before = torch.full((2, 4), 300.0, dtype=torch.float16)  # its squares overflow
    assert negative_cosine(before, before) == pytest.approx(-1, abs=1e-6)
    with pytest.raises(ScoreError, match="not finite"):
        negative_cosine(before, torch.full((2, 4), torch.inf))


def llama():
    model = MODELS["llama"]()
    return model, Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {}), structure_of(model)


def test_it_is_block_influence_by_another_origin():
    model, data, structure = llama()
    influence = block_influence(model, data, structure)
    expected = {name: turn - 1 for name, turn in influence.items()}
    assert input_modification(model, data, structure) == expected
    assert SCORES["input-modification"](model, data, structure) == expected


def test_the_gain_of_the_final_norm_does_not_matter_unless_asked_for():
    model, data, structure = llama()
    first, last = (block.name for block in structure.blocks)
    plain, normed = (input_modification(model, data, structure, final_norm=on) for on in (False, True))
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 3, 32))
    assert input_modification(model, data, structure) == plain
    changed = input_modification(model, data, structure, final_norm=True)
    assert changed[first] == normed[first] == plain[first]
    assert changed[last] != pytest.approx(normed[last], abs=1e-3)


def test_with_the_final_norm_it_is_that_of_the_hidden_states_which_the_model_returns():
    model, data, structure = llama()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 3, 32))
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in data]
    got = input_modification(model, data, structure, final_norm=True)
    for index, value in enumerate(got.values()):
        cosines = [torch.cosine_similarity(of[index], of[index + 1], dim=-1).flatten() for of in states]
        assert value == pytest.approx(-torch.cat(cosines).mean().item(), abs=1e-6)


def test_a_stack_without_a_norm_behind_it():
    model = MODELS["cifar_resnet"]()
    data = Batches((inputs_for("cifar_resnet", model),), {})
    with pytest.raises(ModelError, match=r'no norm stands behind the blocks of "layer1"\. Leave final_norm off'):
        input_modification(model, data, structure_of(model), final_norm=True)
