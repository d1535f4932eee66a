import copy
import gc

import pytest
import torch
from torch import nn

from layerwise.errors import DataError, ModelError, ScoreError, WalkError
from layerwise.scores import SCORES, first_order_gradient, gradient_mass
from layerwise.structure import groups_of, parameter_of, structure_of
from layerwise.tasks import loss_of
from layerwise.tasks.batches import Batches
from models import IMAGES, MODELS, draws, inputs_for


def batches_for(name, model, count=2):
    batches = [inputs_for(name, model, seed=seed) for seed in range(count)]
    if name in IMAGES:
        batches = [batch | {"labels": torch.tensor([1, 0])} for batch in batches]
    return Batches(tuple(batches), {})


def test_worked_by_hand():  # W = [1, -2], G = [3, .5]
    weight, gradient = torch.tensor([1.0, -2]), torch.tensor([3.0, 0.5])
    assert gradient_mass(weight, gradient, "magnitude") == pytest.approx(3 + 1)
    assert gradient_mass(weight, gradient, "square") == pytest.approx(9 + 1)
    assert gradient_mass(weight, gradient, "gradient") == pytest.approx(3.5)
    assert gradient_mass(weight, gradient, "norm") == pytest.approx(9.25**0.5)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)])

    def forward(self, pixel_values):
        return self.blocks[1](self.blocks[0](pixel_values))


def test_scores_are_those_computed_independently():
    model, generator = TwoLayers(), torch.Generator().manual_seed(1)
    data = Batches(
        tuple(
            {
                "pixel_values": torch.randn(5, 4, generator=generator),
                "labels": torch.randint(4, (5,), generator=generator),
            }
            for _ in range(3)
        ),
        {},
    )
    structure = structure_of(model)
    absolute = {layer.name: torch.zeros(layer.shape) for layer in structure}
    squares = copy.deepcopy(absolute)
    for batch in data:
        logits = model(batch["pixel_values"])
        loss = -torch.log_softmax(logits, -1)[range(5), batch["labels"]].mean()
        for layer in structure:
            (gradient,) = torch.autograd.grad(loss, [parameter_of(model, layer)], retain_graph=True)
            absolute[layer.name] += gradient.abs() / 3
            squares[layer.name] += gradient.square() / 3
    weights = {layer.name: parameter_of(model, layer).detach() for layer in structure}
    got = first_order_gradient(model, data, structure)
    assert got == pytest.approx({n: float((weights[n].abs() * g).sum()) for n, g in absolute.items()}, rel=1e-5)
    got_squares = first_order_gradient(model, data, structure, kind="square")
    assert got_squares == pytest.approx(
        {n: float((weights[n].square() * g).sum()) for n, g in squares.items()}, rel=1e-5
    )
    plain = first_order_gradient(model, data, structure, kind="gradient")
    assert plain == pytest.approx({n: float(g.sum()) for n, g in absolute.items()}, rel=1e-5)
    for block, layers in groups_of(structure, "block").items():
        assert SCORES["first-order"](model, data, structure)[block] == sum(got[layer.name] for layer in layers)


@pytest.mark.parametrize("name", ["llama", "t5", "clip", "llava", "blip2", "vit", "mixtral", "gpt2", "cifar_resnet"])
def test_the_norm_is_that_of_autograd_on_every_kind_of_model(name):
    model = MODELS[name]()
    data, structure = batches_for(name, model), structure_of(model)
    got = first_order_gradient(model, data, structure, kind="norm")
    for layer in structure:
        weight, norms = parameter_of(model, layer), []
        for batch in data:
            (gradient,) = torch.autograd.grad(
                loss_of(model, batch), [weight], allow_unused=True, materialize_grads=True
            )
            norms.append(float(gradient.norm()))
        assert got[layer.name] == pytest.approx(sum(norms) / len(norms), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_what_it_was_and_its_own_gradients_stay(dtype):
    model = MODELS["llama"]().to(dtype).train()
    model.model.layers[1].eval()
    model.register_forward_hook(draws)
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, 7) if index % 4 == 0 else None
    wanted = [parameter.requires_grad for parameter in parameters]
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = first_order_gradient(model, batches_for("llama", model), structure_of(model))
    assert all(score > 0 for score in scores.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in parameters] == wanted
    for index, parameter in enumerate(parameters):
        assert (parameter.grad is not None) == (index % 4 == 0)
        assert parameter.grad is None or bool((parameter.grad == 7).all())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_gradient_is_freed_before_the_next_is_there(monkeypatch):
    model, held = MODELS["llama"](), []

    def spy(weight, gradient, kind):
        leaves = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.is_leaf and one.requires_grad]
        assert any(one.shape == weight.shape for one in leaves)
        held.append(sum(one.grad is not None for one in leaves))
        return 1.0

    monkeypatch.setattr("layerwise.scores.first_order.gradient_mass", spy)
    first_order_gradient(model, batches_for("llama", model), structure_of(model))
    assert held == [0] * 2 * 14


def test_half_precision_agrees_with_float32():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model), structure_of(model)
    expected = first_order_gradient(model, data, structure)
    for dtype in (torch.bfloat16, torch.float16):
        got = first_order_gradient(copy.deepcopy(model).to(dtype), data, structure)
        assert got == pytest.approx(expected, rel=0.05)


def test_what_has_no_gradient_is_one_line():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model), structure_of(model)
    with pytest.raises(ModelError, match="batch 0: the loss of LlamaForCausalLM depends on none of the 14 layers, or"):
        first_order_gradient(model, data, structure, loss=lambda model, batch: loss_of(model, batch).detach())
    with pytest.raises(WalkError, match="cannot run on batch 0: "):
        first_order_gradient(model, Batches(({"input_ids": torch.full((1, 4), 10_000)},), {}), structure)
    with pytest.raises(ModelError, match="no loss that is known"):
        flux = MODELS["flux"]()
        first_order_gradient(flux, batches_for("flux", flux), structure_of(flux))
    with pytest.raises(DataError, match="needs labels"):
        vit = MODELS["vit"]()
        first_order_gradient(vit, Batches((inputs_for("vit", vit),), {}), structure_of(vit))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoreError, match="batch 0: the loss is nan"):
        first_order_gradient(model, data, structure)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
