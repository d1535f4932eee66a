"""SNIP, GraSP and SynFlow: the numbers worked by hand on y = W2 W1 x, and what their walks must leave alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.errors import DataError, ModelError, ScoreError, WalkError
from layerwise.scores import (
    SCORES,
    connection_sensitivity,
    gradient_flow,
    gradients,
    grasp_scores,
    hessian_products,
    layer_means,
    snip_scores,
    synaptic_flow,
    synflow_scores,
)
from layerwise.scores.snip import xavier_normal
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches, call
from layerwise.tasks.losses import loss_of
from models import IMAGES, MODELS, draws, inputs_for

X = torch.tensor([[1.0, 2.0]])
WALKS = {"snip": snip_scores, "grasp": grasp_scores, "synflow": synflow_scores}
walks = pytest.mark.parametrize("walk", WALKS.values(), ids=list(WALKS))


def two_linears():
    """y = W2 W1 x, which is 4 for x = (1, 2)."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 1.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    assert model(X).item() == 4
    return model, structure_of(model, include=["*"])


def half_square(model, batch):
    return model(batch["input"]).square().sum() / 2


def batches(*inputs):
    return Batches(tuple({"input": one} for one in inputs), {})


def labelled(name, model, count=2):
    made = []
    for seed in range(count):
        one = inputs_for(name, model, batch=4, seed=seed)
        if name in IMAGES:
            classes = call(model, one)
            classes = getattr(classes, "logits", classes).shape[1]
            one["labels"] = torch.randint(classes, (4,), generator=torch.Generator().manual_seed(seed))
        made.append(one)
    return Batches(tuple(made), {})


def test_snip_worked_by_hand():
    model, structure = two_linears()
    got = snip_scores(model, batches(X), structure, loss=half_square)
    assert got["0"].tolist() == [[4, 8], [4, 16]]
    assert got["1"].tolist() == [[4, 20]]
    assert connection_sensitivity(torch.tensor([-2.0]), torch.tensor([3.0])).tolist() == [6]
    assert layer_means(got) == {"0": 8, "1": 12}


def test_grasp_worked_by_hand():
    """The paper's sign is the other one: -w * Hg, of which the highest go."""
    model, structure = two_linears()
    products = hessian_products(model, batches(X), structure, loss=half_square)
    weights = {"0": model[0].weight.detach(), "1": model[1].weight.detach()}
    assert (-gradient_flow(weights["0"], products["0"])).tolist() == [[-113, 226], [-149, -596]]
    assert (-gradient_flow(weights["1"], products["1"])).tolist() == [[49, -965]]
    got = grasp_scores(model, batches(X), structure, temperature=1, loss=half_square)
    assert all(torch.equal(got[name], gradient_flow(weights[name], products[name])) for name in weights)


def test_the_temperature_divides_the_logits():
    """y / 2 in the loss: the gradient is a quarter, the Hessian a quarter, H g a sixteenth."""
    model, structure = two_linears()
    warm = hessian_products(model, batches(X), structure, loss=half_square)
    cool = hessian_products(model, batches(X), structure, temperature=2, loss=half_square)
    assert all(torch.allclose(cool[name] * 16, warm[name]) for name in warm)
    llama = MODELS["llama"]()
    data, layers = labelled("llama", llama, 1), structure_of(llama)
    cool = gradients(llama, data, layers, temperature=4.0)
    by_hand = copy.deepcopy(llama)  # the head is the last operation: a quarter of it is a quarter of the logits
    by_hand.lm_head.weight.data /= 4
    expected = gradients(by_hand, data, layers)
    assert all(torch.allclose(cool[name], expected[name], rtol=1e-4, atol=1e-8) for name in cool)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_a_temperature_that_would_not_reach_the_loss_is_an_error(name):
    """CLIP gives similarities; BERT has logits, but computes its loss itself, before they could be divided."""
    model = MODELS[name]()
    batch, structure = inputs_for(name, model), structure_of(model)
    data = Batches((batch if name == "clip" else batch | {"labels": batch["input_ids"]},), {})
    assert snip_scores(model, data, structure)
    words = f"the loss of {type(model).__name__} is not taken from logits that a temperature of 200 could divide"
    with pytest.raises(ModelError, match=words):
        grasp_scores(model, data, structure)
    assert grasp_scores(model, data, structure, temperature=1.0)


def test_synflow_worked_by_hand():
    """Ones through |W1| give (2, 1.5), through |W2| 5; w * dR/dw sums to 5 in every layer, as the paper's conservation law says."""
    model, structure = two_linears()
    got = synflow_scores(model, batches(X), structure)
    assert got["0"].tolist() == [[1, 1], [1, 2]]
    assert got["1"].tolist() == [[2, 3]]
    assert synaptic_flow(torch.tensor([2.0]), torch.tensor([-3.0])).tolist() == [6]
    assert torch.equal(
        synflow_scores(model, batches(-7 * X), structure)["0"], got["0"]
    )  # the values of the data do not enter
    masked = synflow_scores(
        model, batches(X), structure, keep={"0": torch.tensor([[0, 1], [1, 1]]).bool(), "1": torch.ones(1, 2).bool()}
    )
    assert masked["0"].tolist() == [[0, 1], [1, 2]]
    assert masked["1"].tolist() == [[1, 3]]


@pytest.mark.parametrize("cut", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0.0, 6.0), nn.Hardtanh()])
def test_flow_passes_activations_that_are_cut_off_at_the_top(cut):
    draw = torch.Generator().manual_seed(0)
    networks = [nn.Sequential(nn.Linear(8, 8), one, nn.Linear(8, 4)) for one in (nn.ReLU(), cut)]
    for parameters in zip(*(network.parameters() for network in networks), strict=True):
        value = 9 * torch.randn(parameters[0].shape, generator=draw)  # everything is above the cut
        for parameter in parameters:
            parameter.data = value.clone()
    want, got = (synflow_scores(one, batches(torch.ones(1, 8)), structure_of(one, include=["*"])) for one in networks)
    assert all((score > 0).all() for score in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_flow_is_summed_before_a_softmax_that_ends_the_network(end):
    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    want, got = (
        synflow_scores(one, batches(torch.ones(1, 8)), structure_of(one, include=["*"]))
        for one in (nn.Sequential(body), nn.Sequential(body, end))
    )
    assert all((score > 0).any() for score in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_flow_is_conserved_in_a_network_with_batch_norms():
    model = MODELS["cifar_resnet"]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.7)  # as in a trained network; it must not turn signals negative
                module.bias.zero_()
        model.fc.bias.zero_()
    structure = structure_of(model, include=["conv1", "fc"])  # every path goes through both
    got = synflow_scores(model, labelled("cifar_resnet", model, 1), structure)
    assert got["conv1"].sum().item() == pytest.approx(got["fc"].sum().item(), rel=1e-9)
    assert (got["fc"] > 0).all()


@walks
@pytest.mark.parametrize("name", ["cifar_resnet", "vit", "llama"])
def test_the_model_is_left_as_it_was(walk, name):
    model = MODELS[name]().train()
    model.register_forward_hook(draws)
    model.get_submodule(structure_of(model).layers[0].name).weight.requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    data, structure = labelled(name, MODELS[name]()), structure_of(model)
    first, second = walk(model, data, structure), walk(model, data, structure)
    assert list(first) == [layer.name for layer in structure]
    for layer in structure:
        assert first[layer.name].shape == layer.shape
        assert not first[layer.name].requires_grad
        assert torch.equal(first[layer.name], second[layer.name])
        assert first[layer.name].any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for parameter, (flag, grad) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad == flag
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cifar_resnet", "gpt2", "mixtral"])
def test_gradients_equal_those_of_a_plain_backward_pass(name):
    model = MODELS[name]()
    data, structure = labelled(name, model), structure_of(model)
    got = gradients(model, data, structure)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.training = isinstance(module, nn.BatchNorm2d)  # batch norms by the batch
    sum(loss_of(plain, batch) for batch in data).backward()
    for layer in structure:
        assert torch.allclose(got[layer.name], plain.get_parameter(layer.parameter).grad, rtol=1e-4, atol=1e-7), (
            layer.name
        )


def test_hessian_products_equal_finite_differences():
    model = MODELS["llama"]().double()
    data, structure = labelled("llama", model, 1), structure_of(model)
    got = hessian_products(model, data, structure)
    g, step = gradients(model, data, structure), 1e-4
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        for layer in structure:
            moved.get_parameter(layer.parameter).data += sign * step * g[layer.name]
        sides.append(gradients(moved, data, structure))
    for name, product in got.items():
        slope = (sides[0][name] - sides[1][name]) / (2 * step)
        assert (slope - product).norm() < 0.02 * product.norm(), name


def test_a_redrawn_network_does_not_know_its_weights():
    model = MODELS["cifar_resnet"]()
    data, structure = labelled("cifar_resnet", model), structure_of(model, include=["*"])
    drawn = snip_scores(model, data, structure, redraw=True, seed=1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in structure:
            other.get_parameter(layer.parameter).mul_(-3)
    again = snip_scores(other, data, structure, redraw=True, seed=1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["fc"], snip_scores(model, data, structure, redraw=True, seed=2)["fc"])


def test_xavier_has_the_deviation_of_torch():
    """Of (64, 32, 3, 3) torch's is sqrt(2 / (9 * 96))."""
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Linear(300, 200), nn.Embedding(5, 4)
    )
    drawn = xavier_normal(model, 0)
    assert list(drawn) == ["0.weight", "1.weight", "2.weight"]
    for name, values in drawn.items():
        reference = torch.empty_like(values)
        generator = torch.Generator().manual_seed(0)
        nn.init.xavier_normal_(reference, generator=generator)
        assert values.shape == model.get_parameter(name).shape
        assert values.std().item() == pytest.approx(reference.std().item(), rel=0.1)
    model[0] = nn.Conv2d(16, 64, 3)
    assert torch.equal(xavier_normal(model, 0)["2.weight"], drawn["2.weight"])  # a stream for each layer


def test_tied_weights_have_one_gradient():
    model = MODELS["qwen2"]()
    data = labelled("qwen2", model, 1)
    head = gradients(model, data, structure_of(model, include=["lm_head"]))["lm_head"]
    plain = copy.deepcopy(model)
    loss_of(plain, data[0]).backward()
    assert torch.allclose(head, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-7)  # what the embedding adds is in it


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_scores_can_be_looked_at_by_name(score):
    model = MODELS["llama"]()
    got = SCORES[score](model, labelled("llama", model, 1), structure_of(model))
    assert set(got) == {layer.name for layer in structure_of(model)}
    assert all(isinstance(value, float) for value in got.values())


def test_what_has_no_loss_is_told_so():
    model = MODELS["cifar_resnet"]()
    structure = structure_of(model)
    bare = Batches((inputs_for("cifar_resnet", model),), {})
    for walk in (snip_scores, grasp_scores):
        with pytest.raises(DataError, match="a loss of CifarResNet needs labels"):
            walk(model, bare, structure)
        with pytest.raises(DataError, match="there are none"):
            walk(model, Batches((), {}), structure)
    with pytest.raises(DataError, match="there is none"):
        synflow_scores(model, Batches((), {}), structure)
    flux = MODELS["flux"]()
    with pytest.raises(ModelError, match="FluxTransformer2DModel has no loss that is known"):
        grasp_scores(flux, Batches((inputs_for("flux", flux),), {}), structure_of(flux))


@walks
def test_what_the_model_cannot_run_on_is_one_line_with_the_batch(walk):
    model = MODELS["llama"]()
    broken = {"input_ids": torch.full((2, 4), 10_000)}
    before = [] if walk is synflow_scores else [inputs_for("llama", model)]  # it looks at the first batch alone
    with pytest.raises(WalkError, match=rf"^the model cannot run on batch {len(before)}: IndexError: [^\n]+$"):
        walk(model, Batches((*before, broken), {}), structure_of(model))


def test_a_loss_that_is_not_finite_or_knows_no_layer_is_an_error():
    model, structure = two_linears()
    with pytest.raises(ScoreError, match="the loss is nan"):
        gradients(model, batches(X * float("nan")), structure, loss=half_square)
    with pytest.raises(ModelError, match="depends on none of the 2 layers"):
        gradients(model, batches(X), structure, loss=lambda model, batch: batch["input"].sum())
    with pytest.raises(ScoreError, match='layer "0": its gradient is not finite'):
        gradients(
            model, batches(X), structure, loss=lambda model, batch: (model(batch["input"]) - 4).abs().sqrt().sum()
        )
    linear = gradients(model, batches(X), structure, loss=lambda model, batch: model[1].weight.sum())
    assert not linear["0"].any()  # the loss does not look
    products = hessian_products(model, batches(X), structure, loss=lambda model, batch: model[1].weight.sum())
    assert not products["1"].any()


def test_one_example_is_too_few_for_batch_norms():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    structure = structure_of(model, include=["0", "2"])
    assert gradients(model, batches(torch.eye(2)), structure, loss=half_square)["0"].any()
    with pytest.raises(DataError, match="batches of more than one example"):
        gradients(model, batches(X), structure, loss=half_square)


def test_a_streamed_model_is_refused():
    model, structure = two_linears()
    model.to("meta")
    for walk in (snip_scores, grasp_scores, synflow_scores):
        with pytest.raises(ModelError, match="whole model in memory"):
            walk(model, batches(X), structure)


def test_an_operation_without_second_derivative_is_named():
    model, structure = two_linears()

    def attends(model, batch):
        hidden = model[0](batch["input"])[None, None]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the fused kernel of the CPU
            return nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).square().sum()

    with pytest.raises(ScoreError, match="cannot be differentiated twice: derivative for"):
        hessian_products(model, batches(torch.ones(3, 2)), structure, loss=attends)
