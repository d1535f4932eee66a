"""Per-sample Fisher of blocks: numbers worked by hand, the walk against plain autograd, and properties."""

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ConfigError, DataError, ScoreError
from layerwise.scores import block_fisher, block_products, fisher_cost, fisher_curve, fisher_order, squared_outputs
from layerwise.structure import as_matrices, parameter_of, structure_of
from layerwise.tasks.batches import Batches, exactly, single_samples
from layerwise.tasks.losses import loss_of
from models import MODELS, inputs_for

WEIGHT = torch.tensor([[[1.0, 2, 1, 1]]])
GRADIENTS = [torch.tensor([[[1.0, 0, 2, 0]]]), torch.tensor([[[0.0, 1, -2, -1]]])]


def test_worked_by_hand_and_the_mean_gradient_inverts_the_ranking():
    z = torch.stack([block_products(WEIGHT, g, (1, 2)) for g in GRADIENTS])
    assert z.tolist() == [[1, 2], [2, -3]]
    sets = [torch.tensor(gone) for gone in ([True, False], [False, True], [True, True])]
    assert [fisher_cost(z, gone) for gone in sets] == [1.25, 3.25, 2.5]
    mean = z.mean(0, keepdim=True)
    assert [fisher_cost(mean, gone) for gone in sets] == [1.125, 0.125, 0.5]
    assert fisher_order(z).tolist() == [0, 1]
    assert fisher_order(mean).tolist() == [1, 0]


def test_of_equals_the_lower_index_stays():
    assert fisher_order(torch.ones(3, 4)).tolist() == [3, 2, 1, 0]
    assert fisher_order(torch.ones(3, 4), greedy=True).tolist() == [3, 2, 1, 0]
    assert fisher_order(torch.tensor([[0.0, 1, 0, 1]])).tolist() == [2, 0, 3, 1]


drawn_z = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31)).map(
    lambda three: torch.randn(three[0], three[1], generator=torch.Generator().manual_seed(three[2])).double()
)


@settings(deadline=None, max_examples=40)
@given(drawn_z)
def test_curves_are_the_cost_of_each_prefix(z):
    for greedy in (False, True):
        order = fisher_order(z, greedy)
        assert sorted(order.tolist()) == list(range(z.shape[1]))
        curve = fisher_curve(z, order)
        gone = torch.zeros(z.shape[1], dtype=torch.bool)
        for place, block in enumerate(order.tolist()):
            assert curve[place] == pytest.approx(fisher_cost(z, gone), abs=1e-12)
            gone[block] = True
        assert curve[-1] == pytest.approx(fisher_cost(z, gone), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(drawn_z)
def test_greedy_takes_the_cheapest_next_block(z):
    gone = torch.zeros(z.shape[1], dtype=torch.bool)
    for block in fisher_order(z, greedy=True).tolist():
        costs = {}
        for other in (~gone).nonzero().flatten().tolist():
            trial = gone.clone()
            trial[other] = True
            costs[other] = fisher_cost(z, trial)
        assert costs[block] <= min(costs.values()) + 1e-9
        gone[block] = True


def test_greedy_in_few_rounds_takes_each_block_once():
    z = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    order = fisher_order(z, greedy=True, rounds=4)
    assert sorted(order.tolist()) == list(range(37))
    assert order[:10].tolist() == fisher_order(z).tolist()[:10]  # the first round knows no more than the single scores


@pytest.mark.parametrize("name", ["vit", "deit", "timm_vit", "swin", "cifar_resnet", "llama", "gpt2", "mixtral", "t5"])
def test_the_walk_is_one_plain_backward_pass_for_each_sample(name):
    model = MODELS[name]()
    structure = structure_of(model)
    batches = [inputs_for(name, model, batch=2, seed=seed) for seed in range(2)]
    if "pixel_values" in batches[0]:
        batches = [{**batch, "labels": torch.tensor([1, 0])} for batch in batches]
    data = Batches(tuple(batches), {})
    shapes = {layer.name: (layer.rows // 2, 1) for layer in structure if layer.rows % 2 == 0}
    before = copy.deepcopy(model.state_dict())
    z = block_fisher(model, data, structure, shapes, samples=3)
    assert z.keys() == shapes.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for row, batch in enumerate(single_samples(data, 3)):
        model.zero_grad()
        loss_of(model, batch).backward()
        for layer in structure:
            if layer.name in shapes:
                weight = parameter_of(model, layer)
                if weight.grad is None:
                    assert not z[layer.name][row].any()
                    continue
                w, g = as_matrices(weight.detach(), layer), as_matrices(weight.grad, layer)
                halves = (w * g).reshape(layer.matrices, 2, layer.rows // 2, layer.columns).sum(2).flatten()
                torch.testing.assert_close(z[layer.name][row], halves, rtol=1e-4, atol=1e-6)


def test_half_precision_is_computed_and_scaled():
    data = Batches(({**inputs_for("vit", MODELS["vit"]()), "labels": torch.tensor([1, 0])},), {})
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = MODELS["vit"]().to(dtype)
        same = Batches(({k: v.to(dtype) if v.is_floating_point() else v for k, v in data[0].items()},), {})
        structure = structure_of(model)
        found[dtype] = block_fisher(model, same, structure, {layer.name: (8, 8) for layer in structure})
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        for name, z in found[dtype].items():
            assert z.dtype == torch.float32
            off = (z - found[torch.float32][name]).norm()
            assert off <= tolerance * found[torch.float32][name].norm()


def test_a_loss_without_labels():
    model = MODELS["timm_vit"]()
    batch = inputs_for("timm_vit", model, batch=1)
    structure = structure_of(model)
    shapes = {"blocks.0.mlp.fc1": (64, 32)}
    z = block_fisher(model, [batch], structure, shapes, loss=squared_outputs)
    model(**batch).square().mean().backward()
    weight = model.get_parameter("blocks.0.mlp.fc1.weight")
    assert z["blocks.0.mlp.fc1"].item() == pytest.approx(float((weight.detach() * weight.grad).sum()), rel=1e-4)


def test_bad_data_is_named(monkeypatch):
    model = MODELS["timm_vit"]()
    structure = structure_of(model)
    shapes = {layer.name: (8, 8) for layer in structure}
    batch = {**inputs_for("timm_vit", model), "labels": torch.tensor([1, 0])}
    with pytest.raises(DataError, match="there are none"):
        block_fisher(model, [], structure, shapes)
    with pytest.raises(DataError, match="labels"):
        block_fisher(model, [{"pixel_values": batch["pixel_values"]}], structure, shapes)
    with pytest.raises(ScoreError, match="batch 0: the loss is nan"):
        block_fisher(model, [{**batch, "pixel_values": batch["pixel_values"] * torch.nan}], structure, shapes)
    monkeypatch.setattr(sys.modules["layerwise.scores.block_fisher"], "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="take larger blocks or fewer samples"):
        block_fisher(model, [batch], structure, shapes)


def test_single_samples_share_what_is_not_per_sample():
    batch = {"x": torch.arange(6.0).reshape(3, 2), "grid": torch.zeros(5, 2), "scale": torch.tensor(2.0)}
    singles = single_samples([batch, batch], 4)
    assert [one["x"].tolist() for one in singles] == [[[0, 1]], [[2, 3]], [[4, 5]], [[0, 1]]]
    assert singles[0]["grid"] is batch["grid"]
    assert singles[3]["scale"] is batch["scale"]
    cut = exactly([batch, batch], 4)
    assert [len(one["x"]) for one in cut] == [3, 1]
    assert cut[1]["grid"] is batch["grid"]
    assert [len(one["x"]) for one in exactly([batch, batch], 9)] == [3, 3]
