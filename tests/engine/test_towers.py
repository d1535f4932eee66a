"""Models of several towers: what comes first is pruned first, and what comes later is measured on what the pruned part gives."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from layerwise.engine import BlockStarted, compress, walk
from layerwise.methods import Uniform
from layerwise.passes.rows import input_rows
from layerwise.solvers import Wanda
from layerwise.structure import module_of, structure_of, towers_of
from layerwise.tasks.batches import Batches, call
from models import MODELS, inputs_for


def batches_for(name, model, count=2):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(count)), {})


@dataclass(frozen=True)
class Spy(Wanda):
    """Wanda that remembers the sums of squares that it was shown, in order."""

    seen: list = field(default_factory=list, compare=False)

    def solve(self, weights, inputs, prunes, generators):
        self.seen.extend([inputs.squares.clone()] * len(weights))  # layers that share their input
        return super().solve(weights, inputs, prunes, generators)


def lively(name):
    """The model; BLIP-2's vision tower and queries, which it starts at nearly nothing, with weights that do something."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) < 1e-6 and "bias" not in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def squares_of(model, layer, data):
    """Sums of squares of what reaches this layer in plain forward passes."""
    found = []
    handle = module_of(model, layer).register_forward_pre_hook(
        lambda module, args: found.append(input_rows(module, layer, args[0])[0].double().square().sum(0))
    )
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    handle.remove()
    return sum(found).float()


def compressed(name, sparsity=0.5):
    """The pruned model, the dense one, and by layer the squares that the solver saw."""
    dense = lively(name)
    model, data = copy.deepcopy(dense), batches_for(name, dense)
    spy = Spy()
    result = compress(model, Uniform(sparsity=sparsity).plan(model), solver=spy, data=data)
    seen = dict(zip([layer.layer for layer in result.layers], spy.seen, strict=True))
    return model, dense, data, seen


def with_dense(model, dense, prefix):
    """The pruned model with the weights below `prefix` as they were."""
    mixed = copy.deepcopy(model)
    state = {key: value for key, value in dense.state_dict().items() if key.startswith(prefix)}
    assert state
    mixed.load_state_dict(state, strict=False)
    return mixed


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("llava", ["model.vision_tower", "model.language_model"]),
        ("blip2", ["vision_model", "qformer", "language_model"]),
        ("clip", ["vision_model", "text_model"]),
        ("t5", ["encoder", "decoder"]),
    ],
)
def test_towers_are_pruned_in_the_order_in_which_they_run(name, order):
    model = MODELS[name]()
    events = walk(model, Uniform().plan(model), Wanda(), batches_for(name, model))
    blocks = [event.block for event in events if isinstance(event, BlockStarted)]
    towers = [next(tower for tower in order if block.startswith(tower)) for block in blocks]
    assert list(dict.fromkeys(towers)) == order
    assert sorted(towers, key=order.index) == towers


@pytest.mark.parametrize(
    ("name", "vision", "language"),
    [
        ("llava", "model.vision_tower", "model.language_model.layers.0"),
        ("blip2", "vision_model", "language_model.model.decoder.layers.0"),
        ("blip2", "vision_model", "qformer.encoder.layer.0"),
        ("t5", "encoder", "decoder.block.0"),
    ],
)
def test_later_towers_are_measured_behind_the_pruned_first_one(name, vision, language):
    model, dense, data, seen = compressed(name)
    structure = structure_of(model)
    block = next(one for one in structure.blocks if one.name == language)
    tower = next(tower for tower in towers_of(structure) if language.startswith(tower))
    behind_pruned = with_dense(model, dense, tower)  # what comes before the block as pruned, the block itself not yet
    told_apart = 0
    for layer in block.layers:
        expected = squares_of(behind_pruned, layer, data)
        assert torch.allclose(seen[layer.name], expected, rtol=2e-5)
        told_apart += not torch.allclose(seen[layer.name], squares_of(dense, layer, data), rtol=1e-3)
    assert told_apart  # with a dense first tower it would be something else


def test_the_towers_of_clip_do_not_see_each_other():
    model, dense, data, seen = compressed("clip")
    for layer in structure_of(model).layers:
        if ".layers.0." in layer.name:
            assert torch.allclose(seen[layer.name], squares_of(dense, layer, data), rtol=1e-3)
        else:  # measured behind the pruned first block of its own tower
            tower = layer.name.split(".")[0]
            behind = with_dense(model, dense, f"{tower}.encoder.layers.1")
            assert torch.allclose(seen[layer.name], squares_of(behind, layer, data), rtol=1e-3)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_t5_is_calibrated_with_its_position_bias_in_every_block(stack):
    """Only block 0 makes the bias; the official code replays later blocks without it."""
    model, dense, data, seen = compressed("t5")
    structure = structure_of(model)
    block = next(one for one in structure.blocks if one.name == f"{stack}.block.1")
    behind = with_dense(model, dense, f"{stack}.block.1.")
    if stack == "encoder":
        behind.load_state_dict({k: v for k, v in dense.state_dict().items() if k.startswith("decoder")}, strict=False)
    without = copy.deepcopy(behind)
    squares = {layer.name: squares_of(behind, layer, data) for layer in block.layers}
    for layer in block.layers:
        assert torch.allclose(seen[layer.name], squares[layer.name], rtol=1e-3)

    # as the official code: block 0 keeps its bias, block 1 gets none
    second = getattr(without, stack).block[1]
    plain = second.forward

    def replayed(hidden, mask, position_bias, *rest, **kwargs):
        assert position_bias.abs().max() > 0
        return plain(hidden, mask, torch.zeros_like(position_bias), *rest, **kwargs)

    second.forward = replayed
    output = next(layer for layer in block.layers if layer.name.endswith("SelfAttention.o"))
    assert not torch.allclose(seen[output.name], squares_of(without, output, data), rtol=1e-2)
