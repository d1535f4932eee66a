import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.errors import ModelError, ScoreError
from layerwise.scores import output_error, output_gradients
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def test_worked_by_hand():
    """Tokens (1, 0), (1, 2): outputs change by (1, 0) and (1, 4), squares 1 + 1 and 0 + 16."""
    change, inputs = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 0], [1, 2]])
    gram = inputs.T @ inputs
    assert output_error(change, gram) == 18
    assert output_error(change, gram, torch.tensor([3.0, 0.5])) == 14
    assert output_error(torch.zeros(2, 2), gram) == 0
    with pytest.raises(ScoreError, match="not finite"):
        output_error(change * torch.nan, gram)


def test_gradients_of_two_layers_worked_by_hand():
    """y = 2 relu(x - 1), loss = sum y^2 / 2: dL/dy = y and dL/dh = 2 y where x > 1."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(inplace=True), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-1.0)
        model[2].weight.fill_(2.0)
    structure = structure_of(model, include=["*"])
    data = Batches(({"input": torch.tensor([[3.0], [0.0]])}, {"input": torch.tensor([[2.0]])}), {})
    got = output_gradients(model, data, structure, loss=lambda m, batch: m(batch["input"]).square().sum() / 2)
    assert {name: total.tolist() for name, total in got.items()} == {"0": [[64.0 + 16]], "2": [[16.0 + 4]]}


def test_they_are_those_that_autograd_gives():
    model = MODELS["llama"]().train()
    batches = [{**inputs_for("llama", model, seed=seed)} for seed in range(2)]
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    got = output_gradients(model, Batches(tuple(batches), {}), structure_of(model))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None
    model.eval()
    layer, total = model.model.layers[0].mlp.down_proj, 0.0
    for batch in batches:
        seen = []
        handle = layer.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        logits, ids = model(**batch).logits, batch["input_ids"]
        handle.remove()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, seen)
        total = total + gradient.square().sum((0, 1)).double()
    assert torch.allclose(got["model.layers.0.mlp.down_proj"][0], total, rtol=1e-4)
    assert list(got) == [layer.name for layer in structure_of(model)]


def test_of_convolutions_each_channel_is_an_output():
    model = MODELS["cifar_resnet"]()
    data = Batches(({**inputs_for("cifar_resnet", model), "labels": torch.tensor([1, 0])},), {})
    got = output_gradients(model, data, structure_of(model))
    for layer in structure_of(model):
        assert tuple(got[layer.name].shape) == (layer.matrices, layer.rows)
        assert (got[layer.name] > 0).any()


def test_fused_experts_have_no_outputs_of_their_own():
    model = MODELS["mixtral"]()
    with pytest.raises(ModelError, match=r'experts.*" has no outputs of its own'):
        output_gradients(model, Batches((inputs_for("mixtral", model),), {}), structure_of(model))
