import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise.errors import ConfigError, ModelError, WalkError
from layerwise.passes import Replays
from layerwise.structure import parameter_of, structure_of
from layerwise.tasks import loss_of
from models import IMAGES, MODELS, inputs_for

TRAINED = [name for name in MODELS if name not in ("dit", "sd3", "flux")]


def batch_for(name, model, seed=0):
    batch = inputs_for(name, model, seed=seed)
    if name == "bert":
        return batch | {"labels": batch["input_ids"]}
    return batch | {"labels": torch.tensor([1, 0])} if name in IMAGES else batch


def plain(model, batch):
    with torch.no_grad():
        return float(loss_of(model, batch))


@pytest.mark.parametrize("name", TRAINED)
def test_a_pass_from_a_moved_block_on_is_the_whole_pass_bit_for_bit(name):
    model, structure = MODELS[name](), structure_of(MODELS[name]())
    batch = batch_for(name, model)
    dense = plain(model, batch)
    with Replays(model, [block.name for block in structure.blocks], tail="exact") as replays:
        recording = replays.record(batch)
        assert recording.loss == dense
        assert sorted(recording.order) == sorted(block.name for block in structure.blocks)
        for block in structure.blocks:
            weight = parameter_of(model, block.layers[0])
            kept = weight.data
            weight.data = kept * 1.5
            moved = replays.loss_from(recording, block.name)
            assert moved == plain(model, batch)
            assert moved == replays.loss_from(recording)
            weight.data = kept
            assert replays.loss_from(recording, block.name) == dense
    assert plain(model, batch) == dense
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", TRAINED)
def test_the_slope_behind_the_last_block_is_that_of_autograd(name):
    model = MODELS[name]()
    batch = batch_for(name, model)
    blocks = [block.name for block in structure_of(model).blocks]
    with Replays(model, blocks) as replays:
        recording = replays.record(batch)
    whole = {}

    def keep(block, output):
        whole[block] = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
        for leaf in whole[block]:
            if leaf.requires_grad:
                leaf.retain_grad()

    handles = [
        model.get_submodule(block).register_forward_hook(lambda _, __, output, block=block: keep(block, output))
        for block in blocks
    ]
    loss_of(model, batch).backward()
    for handle in handles:
        handle.remove()
    assert recording.slopes
    for block, slopes in recording.slopes.items():
        for place, slope in slopes:
            gradient = whole[block][place].grad
            assert torch.allclose(slope, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "clip", "llava", "timm_vit", "swin", "whisper"])
def test_a_linear_tail_gives_the_slope_of_the_loss(name):
    """Central differences beside autograd, on smooth models; norms compute in float32 whatever the weights."""
    model, structure = MODELS[name]().double(), structure_of(MODELS[name]())
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_for(name, model).items()}
    loss = loss_of(model, batch)
    generator, step = torch.Generator().manual_seed(0), 1e-3
    with Replays(model, [block.name for block in structure.blocks]) as replays:
        recording = replays.record(batch)
        assert recording.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        for block in structure.blocks:
            layer = block.layers[0]
            weight = parameter_of(model, layer)
            (gradient,) = torch.autograd.grad(
                loss, [weight], retain_graph=True, materialize_grads=True, allow_unused=True
            )
            if gradient is None:  # a layer behind what the loss looks at
                continue
            kept, z = weight.data, torch.randn(layer.shape, generator=generator, dtype=torch.float64)
            sides = []
            for sign in (1, -1):
                weight.data = kept + sign * step * z
                sides.append(replays.loss_from(recording, block.name))
                weight.data = kept
            expected = float(
                (gradient * z).sum()
            )  # 0 for the last vision block of LLaVA: its features are those before
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(expected, abs=3e-3 * float(gradient.norm()))


def test_only_blocks_from_the_moved_one_on_run_and_a_linear_tail_ends_there():
    model = MODELS["llama"]()
    ran = []
    for name in ("model.layers.0.mlp", "model.layers.1.mlp", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    batch = inputs_for("llama", model)
    for tail, head in (("exact", ["lm_head"]), ("linear", [])):
        with Replays(model, ["model.layers.0", "model.layers.1"], tail=tail) as replays:
            recording = replays.record(batch)
            ran.clear()
            replays.loss_from(recording, "model.layers.1")
            assert ran == ["model.layers.1.mlp", *head]
            ran.clear()
            replays.loss_from(recording, "model.layers.0")
            assert ran == ["model.layers.0.mlp", "model.layers.1.mlp", *head]
            ran.clear()
            replays.loss_from(recording)
            assert ran == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]


class Drawing(nn.Module):
    """Noise inside the blocks, between them and in front of the loss."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), Noise()) for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + torch.rand_like(x)
        return {"loss": (x + torch.rand_like(x)).square().sum()}


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize("tail", ["linear", "exact"])
def test_a_model_that_draws_draws_the_same_in_every_pass(tail):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Drawing()
        state = torch.get_rng_state()
        with Replays(model, ["blocks.0", "blocks.1", "blocks.2"], tail=tail) as replays:
            recording = replays.record({"x": torch.ones(2, 4)})
            for block in ("blocks.2", "blocks.0", "blocks.1", None):
                assert replays.loss_from(recording, block) == recording.loss
        assert torch.equal(torch.get_rng_state(), state)


def test_both_towers_of_clip_reach_the_loss_and_one_of_llava():
    for name, exits in (("clip", ["text_model.encoder.layers.1", "vision_model.encoder.layers.1"]),
                        ("llava", ["model.language_model.layers.1"]), ("t5", ["decoder.block.1"])):  # fmt: skip
        model = MODELS[name]()
        with Replays(model, [block.name for block in structure_of(model).blocks]) as replays:
            assert sorted(replays.record(inputs_for(name, model)).slopes) == exits


def test_mode_gradients_and_weights_are_given_back():
    model = MODELS["llama"]().train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    with Replays(model, ["model.layers.0", "model.layers.1"]) as replays:
        replays.loss_from(replays.record(inputs_for("llama", model)), "model.layers.1")
        assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class InPlace(nn.Module):
    """A block that writes into its input, between code that writes into its output."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Adds(), Adds()])

    def forward(self, x):
        x = self.blocks[0](x)
        x += 1
        x = self.blocks[2](self.blocks[1](x))
        x *= 2
        return {"loss": x.square().sum()}


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        x += self.lin(x)
        return x


@pytest.mark.parametrize("tail", ["exact", "linear"])
def test_writing_in_place_leaves_the_recording_alone(tail):
    model, batch = InPlace().eval(), {"x": torch.arange(4.0)[None]}
    blocks = [f"blocks.{index}" for index in range(3)]
    with Replays(model, blocks, tail=tail) as replays:
        recording = replays.record(batch)
        assert recording.loss == plain(model, batch)
        for _ in range(2):
            for block in blocks:
                assert replays.loss_from(recording, block) == pytest.approx(recording.loss, rel=1e-6)
        with torch.no_grad():
            model.blocks[1].lin.weight *= 1.0001
        expected = plain(model, batch)
        assert expected != recording.loss
        assert replays.loss_from(recording, "blocks.1") == pytest.approx(expected, rel=1e-5)


def test_errors_are_one_line():
    model = MODELS["llama"]()
    with pytest.raises(ConfigError, match="linear or exact"):
        Replays(model, [], tail="short")
    with Replays(model, ["model.layers.0"]) as replays, pytest.raises(WalkError, match="cannot run on batch 3: "):
        replays.record({"input_ids": torch.full((1, 4), 10_000)}, 3)
    flux = MODELS["flux"]()
    with Replays(flux, ["transformer_blocks.0"]) as replays, pytest.raises(ModelError, match="no loss that is known"):
        replays.record(inputs_for("flux", flux))
    assert not any("forward" in vars(module) for module in [*model.modules(), *flux.modules()])
