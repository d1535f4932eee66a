import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import layerwise as lw
from layerwise.errors import ConfigError, DataError, ModelError, ScoreError, WalkError
from layerwise.scores import central_slope, first_order_gradient, norm_from_slopes, zeroth_order_gradient
from layerwise.scores.zeroth_order import moved
from layerwise.structure import structure_of
from layerwise.tasks import loss_of
from layerwise.tasks.batches import Batches
from models import IMAGES, MODELS, draws, inputs_for

W, Z = torch.tensor([[1.0, 2], [-1, 0.5]]), torch.tensor([[1.0, -1], [2, 0.5]])


def batches_for(name, model, count=2):
    batches = [inputs_for(name, model, seed=seed) for seed in range(count)]
    if name in IMAGES:
        batches = [batch | {"labels": torch.tensor([1, 0])} for batch in batches]
    return Batches(tuple(batches), {})


def slope_of(loss, weight, direction, step):
    return central_slope(float(loss(weight + step * direction)), float(loss(weight - step * direction)), step)


@pytest.mark.parametrize("step", [1e-3, 0.1, 3.0])
def test_linear_and_quadratic_losses_have_exact_slopes(step):
    weight, direction = W.double(), Z.double()
    assert slope_of(lambda w: w.square().sum(), weight, direction, step) == pytest.approx(-5.5, abs=1e-9)
    slopes = torch.tensor([[0.3, -2], [5, 1]], dtype=torch.float64)  # <A, z> = .3 + 2 + 10 + .5
    assert slope_of(lambda w: (slopes * w).sum(), weight, direction, step) == pytest.approx(12.8, abs=1e-9)


def test_mean_slope_tends_to_the_gradients_norm():  # gradient diag(3, 4): norm 5, mean |g| 5 * sqrt(2 / pi) = 3.98942
    draws = torch.randn(20_000, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = (draws * torch.diag(torch.tensor([3.0, 4.0]))).sum((1, 2))
    assert float(slopes.abs().mean()) == pytest.approx(5 * math.sqrt(2 / math.pi), rel=0.02)
    assert norm_from_slopes(slopes.tolist()) == pytest.approx(5, rel=0.02)
    # one draw is off by sqrt(pi / 2 - 1) = 0.756 of the norm
    single = torch.tensor([norm_from_slopes([slope]) for slope in slopes.tolist()])
    assert float(single.std()) / 5 == pytest.approx(0.7555, rel=0.03)


def test_slopes_that_mean_nothing_are_refused():
    with pytest.raises(ScoreError, match="not finite"):
        central_slope(float("nan"), 1.0, 0.1)
    with pytest.raises(ScoreError, match="precision swallows the step"):
        central_slope(1.0, 1.0, 0.0)
    with pytest.raises(ScoreError, match="no slopes"):
        norm_from_slopes([])


def test_a_move_is_measured_where_half_precision_swallows_part_of_it():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 200, generator=generator)
    length = float(z.square().sum())
    for deviation, unchanged in ((0.02, 0.04), (0.05, 0.09), (0.5, 0.60)):  # of the official step, 1e-3
        weight = (deviation * torch.randn(200, 200, generator=generator)).bfloat16()
        above, _, _ = moved(weight, z, 1e-3)
        assert float((above == weight).float().mean()) == pytest.approx(unchanged, abs=0.02)
        above, _, went = moved(weight, z, 0.02 * deviation)  # scaled to the weights
        assert float((above == weight).float().mean()) < 0.12
        assert math.sqrt(went / length) == pytest.approx(0.02 * deviation, rel=0.02)
        assert moved(weight.float(), z, 1e-3)[2] == pytest.approx(1e-6 * length, rel=1e-3)


def test_a_step_in_bfloat16_stands_out_of_the_rounding_of_activations():
    """On trained weights; the layers of one block, beside exact norms in float32."""
    model, tokenizer = lw.load("demo", dtype="float32"), lw.load_tokenizer("demo")
    data = lw.text("python-docs", tokenizer, samples=4, length=32, batch=2)
    structure = structure_of(model, include=["model.layers.5.*_proj"])
    exact = first_order_gradient(model, data, structure, kind="norm")
    half = model.bfloat16()
    ours, small = (zeroth_order_gradient(half, data, structure, step=step, draws=4) for step in (0.02, 0.002))
    mean, inflated = (sum(got[name] / exact[name] for name in exact) / len(exact) for got in (ours, small))
    assert mean == pytest.approx(1, abs=0.3)  # 8 slopes of 7 layers each: a deviation of .1 beside the rounding
    assert inflated > 1.4  # of a tenth of that step, rounding is a large part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_bit_for_bit_what_it_was(dtype):
    model = MODELS["llama"]().to(dtype).train()
    model.model.layers[1].eval()
    model.register_forward_hook(draws)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for tail in ("linear", "exact"):
        zeroth_order_gradient(model, batches_for("llama", model), structure_of(model), tail=tail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Noisy(nn.Module):
    """Two blocks whose own code adds noise, in evaluation mode too; the loss is linear in it, so no gradient knows of it."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + self.noise * torch.randn_like(x)
        return {"loss": x.sum()}


@pytest.mark.parametrize("tail", ["linear", "exact"])
def test_both_sides_of_a_slope_see_the_same_noise(tail):
    data = Batches(({"x": torch.linspace(-1, 1, 12).view(3, 4)},), {})
    quiet, noisy = Noisy(0.0), Noisy(10.0)
    structure = structure_of(quiet, include=["*"])
    expected = zeroth_order_gradient(quiet, data, structure, tail="exact", draws=4)
    # the second block's own gradient is its input's sum, which has the noise of the first
    got = zeroth_order_gradient(noisy, data, structure, tail=tail, draws=4)
    assert got["blocks.0.0"] == pytest.approx(expected["blocks.0.0"], rel=1e-2)


def test_weights_come_back_when_a_pass_fails():
    model, calls = MODELS["llama"](), []
    before = copy.deepcopy(model.state_dict())

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise ScoreError("enough")
        return loss_of(model, batch)

    with pytest.raises(ScoreError, match=r'layer "model.layers.0.self_attn.q_proj": enough'):
        zeroth_order_gradient(model, batches_for("llama", model), structure_of(model), loss=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "t5", "clip", "llava", "vit", "mixtral", "gpt2", "cifar_resnet"])
def test_scores_tend_to_exact_gradient_norms(name):
    model = MODELS[name]()
    data, structure = batches_for(name, model, 1), structure_of(model)
    exact = first_order_gradient(model, data, structure, kind="norm")
    for tail in ("linear", "exact") if name == "llama" else ("linear",):
        got = zeroth_order_gradient(model, data, structure, draws=10, tail=tail, step=0.01)
        assert list(got) == list(exact)
        ratios = torch.tensor([got[key] / exact[key] for key in exact if exact[key] > 1e-6])
        assert len(ratios) >= 8
        # each has a relative deviation of .756 / sqrt(10) = .24, the mean of 8 or more a third of it
        assert float(ratios.mean()) == pytest.approx(1, abs=0.25)
        assert float(ratios.min()) > 0.3
        assert float(ratios.max()) < 2
        assert all(got[key] < 1e-4 for key in exact if exact[key] == 0)


def test_linear_and_exact_tails_agree_along_the_same_directions():
    model = MODELS["gpt2"]().double()
    data, structure = batches_for("gpt2", model), structure_of(model)

    def loss(model, batch):  # float32 losses of this size differ by chance as much as by the step
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    exact = zeroth_order_gradient(model, data, structure, tail="exact", loss=loss)
    assert zeroth_order_gradient(model, data, structure, loss=loss) == pytest.approx(exact, rel=0.01)


def test_a_linear_tail_is_above_the_noise_of_float32_losses():
    """Beside a run in float64, the differences of hidden states are far closer than those of float32 losses."""
    model = MODELS["gpt2"]()
    data, structure = batches_for("gpt2", model), structure_of(model)
    true = zeroth_order_gradient(copy.deepcopy(model).double(), data, structure)
    worst = {}
    for tail in ("linear", "exact"):
        got = zeroth_order_gradient(model, data, structure, tail=tail)
        worst[tail] = max(abs(got[name] / true[name] - 1) for name in true)
    assert worst["linear"] < 0.01
    assert worst["exact"] > 5 * worst["linear"]


def test_draws_are_private_and_their_own_for_layer_batch_and_seed():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model), structure_of(model)
    first = zeroth_order_gradient(model, data, structure)
    torch.manual_seed(1)
    assert zeroth_order_gradient(model, data, structure) == first
    assert zeroth_order_gradient(model, data, structure, seed=1) != first
    less = structure_of(model, exclude=["*.q_proj"])  # one layer less changes no other's draw
    rest = zeroth_order_gradient(model, data, less)
    assert rest == {name: value for name, value in first.items() if name in rest}
    same = Batches((data[0], data[0]), {})
    halves = [
        zeroth_order_gradient(model, Batches((data[0],), {}), structure),
        zeroth_order_gradient(model, same, structure),
    ]
    assert halves[0] != halves[1]  # the same batch again gets another direction


def test_as_many_batches_are_used_as_hold_the_samples():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model, 3), structure_of(model)  # 2 samples each
    two = zeroth_order_gradient(model, Batches(data.batches[:2], {}), structure)
    assert zeroth_order_gradient(model, data, structure, samples=4) == two
    assert zeroth_order_gradient(model, data, structure, samples=3) == two
    assert zeroth_order_gradient(model, data, structure, samples=2) != two


def test_moved_jointly_a_block_has_the_norm_of_all_its_gradients():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model, 1), structure_of(model)
    exact = first_order_gradient(model, data, structure, kind="norm")
    got = zeroth_order_gradient(model, data, structure, joint=True, draws=60, step=0.01)
    assert list(got) == ["model.layers.0", "model.layers.1"]
    for block in structure.blocks:
        norm = math.sqrt(sum(exact[layer.name] ** 2 for layer in block.layers))
        assert got[block.name] == pytest.approx(norm, rel=0.3)  # deviation .098


def test_layers_outside_blocks_and_tied_ones_take_whole_passes():
    model = MODELS["cifar_resnet"]()
    data, structure = batches_for("cifar_resnet", model, 1), structure_of(model, include=["*"])
    exact = first_order_gradient(model, data, structure, kind="norm")
    got = zeroth_order_gradient(model, data, structure, draws=20, step=0.01)
    for name in ("conv1", "fc"):
        assert got[name] == pytest.approx(exact[name], rel=0.5)
    tied = MODELS["llama"]()
    tied.model.layers[1].self_attn.o_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    data, structure = batches_for("llama", tied, 1), structure_of(tied)
    name = "model.layers.0.self_attn.q_proj"
    exact = first_order_gradient(tied, data, structure, kind="norm")
    got = zeroth_order_gradient(tied, data, structure, draws=20)
    assert got[name] == pytest.approx(exact[name], rel=0.5)


def test_a_layer_of_zeros_can_be_scored():
    model = MODELS["llama"]()
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    data, structure = batches_for("llama", model, 1), structure_of(model)
    got = zeroth_order_gradient(model, data, structure, draws=20)
    exact = first_order_gradient(model, data, structure, kind="norm")
    assert got["model.layers.0.mlp.down_proj"] == pytest.approx(exact["model.layers.0.mlp.down_proj"], rel=0.6)
    assert not model.model.layers[0].mlp.down_proj.weight.any()


def test_what_cannot_be_scored_is_one_line():
    model = MODELS["llama"]()
    data, structure = batches_for("llama", model), structure_of(model)
    for settings in ({"step": 0.0}, {"draws": 0}):
        with pytest.raises(ConfigError, match="step above 0 and at least 1 draw"):
            zeroth_order_gradient(model, data, structure, **settings)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoreError, match=r'layer "model.layers.0.self_attn.q_proj": losses nan and nan: not finite'):
        zeroth_order_gradient(model, data, structure)
    with pytest.raises(ModelError, match="no loss that is known"):
        flux = MODELS["flux"]()
        zeroth_order_gradient(flux, batches_for("flux", flux), structure_of(flux))
    with pytest.raises(DataError, match="needs labels"):
        vit = MODELS["vit"]()
        zeroth_order_gradient(vit, Batches((inputs_for("vit", vit),), {}), structure_of(vit))
    streamed = MODELS["llama"]()
    streamed.layerwise_store = object()
    for score in (zeroth_order_gradient, first_order_gradient):
        with pytest.raises(ModelError, match="load it whole"):
            score(streamed, data, structure)


class Skips(nn.Module):
    """Blocks of which the second is never called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)) for _ in range(2)]
        )

    def forward(self, x):
        return {"loss": self.blocks[0](x).square().mean()}


@pytest.mark.parametrize("score", [zeroth_order_gradient, first_order_gradient])
def test_a_block_that_no_batch_reaches_is_an_error(score):
    with torch.random.fork_rng(devices=[]):
        model = Skips()
    data = Batches(({"x": torch.arange(8.0).reshape(2, 4)},), {})
    with pytest.raises(WalkError, match=r'no calibration batch reaches block "blocks.1"'):
        score(model, data, structure_of(model))
