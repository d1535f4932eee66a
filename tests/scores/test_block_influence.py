import pytest
import torch

from layerwise.errors import ScoreError
from layerwise.scores import block_influence, mean_turn
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def test_worked_by_hand():  # cosines 1, 0 and -1
    before = torch.tensor([[1.0, 0], [1, 0], [2, 0]])
    after = torch.tensor([[3.0, 0], [0, 5], [-1, 0]])
    assert mean_turn(before, after) == pytest.approx(1.0)
    assert mean_turn(before, 7 * before) == pytest.approx(0.0, abs=1e-6)
    assert mean_turn(before, -before) == pytest.approx(2.0)


def test_the_specification_s_number():  # ShortGPT: 1 - mean(cos 45 degrees, 1); a positive scale changes nothing
    before, after = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[1.0, 1], [3, 4]])
    assert mean_turn(before, after) == pytest.approx(0.146447, abs=1e-6)
    assert mean_turn(before, 7 * after) == pytest.approx(0.146447, abs=1e-6)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ScoreError, match="no tokens"):
        mean_turn(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(ScoreError, match="not finite"):
        mean_turn(torch.ones(2, 3), torch.full((2, 3), float("nan")))


def test_influence_equals_that_of_the_hidden_states_the_model_itself_reports():
    model = MODELS["llama"]()
    batches = [inputs_for("llama", model, seed=seed) for seed in range(2)]
    got = block_influence(model, Batches(tuple(batches), {}), structure_of(model))
    states = []
    handles = [
        block.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
        for block in model.model.layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    for index, value in enumerate(got.values()):
        cosines = [torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in states[index::2]]
        assert value == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-6)
        assert value > 1e-4


def test_a_block_that_does_nothing_has_no_influence():
    model = MODELS["llama"]()
    data = Batches((inputs_for("llama", model),), {})
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    got = block_influence(model, data, structure_of(model))
    assert got["model.layers.1"] == pytest.approx(0, abs=1e-6)
    assert got["model.layers.0"] > 1e-4


def test_padding_does_not_count():
    model = MODELS["llama"]()
    ids = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    structure = structure_of(model)
    plain = block_influence(model, Batches(({"input_ids": ids},), {}), structure)
    got = block_influence(model, Batches(({"input_ids": padded, "attention_mask": mask},), {}), structure)
    assert got == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("name", ["t5", "gpt2", "vit", "flux", "llava", "swin", "mixtral"])
def test_every_block_of_other_architectures_has_one(name):
    model = MODELS[name]()
    structure = structure_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    got = block_influence(model, Batches((inputs_for(name, model),), {}), structure)
    assert list(got) == [block.name for block in structure.blocks]
    assert all(1e-7 < value < 2 for value in got.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_change_the_shape_are_not_in_the_result():
    model = MODELS["cifar_resnet"]()
    got = block_influence(model, Batches((inputs_for("cifar_resnet", model),), {}), structure_of(model))
    assert set(got) == {"layer1.0", "layer1.1", "layer2.1", "layer3.1"}


def test_a_block_that_breaks_is_named():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ScoreError, match=r'block "model\.layers\.1": .*not finite'):
        block_influence(model, Batches((inputs_for("llama", model),), {}), structure_of(model))
