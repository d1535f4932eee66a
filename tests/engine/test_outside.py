"""Layers outside every block (stems, heads, projectors): the statistics of a plain forward hook, and everything that a block gets."""

import copy
from typing import ClassVar

import pytest
import torch

from layerwise.engine import LayerSolved, Settings, compress, walk
from layerwise.io.stream import load_streamed
from layerwise.passes.rows import input_rows
from layerwise.plan import Plan, Prune
from layerwise.solvers import SparseGPT, Wanda
from layerwise.structure import as_matrices, module_of, parameter_of, structure_of
from layerwise.tasks.batches import Batches, call
from models import MODELS, inputs_for

EMBEDDINGS = {  # what multiplies nothing; of a tied pair the head is left
    "llama": ["model.embed_tokens"],
    "gpt2": ["transformer.wte"],
    "t5": ["shared", "*.embed_tokens"],
    "whisper": ["*.embed_tokens"],
    "llava": ["*.embed_tokens"],
}
ALONE = {
    "llama": ["lm_head"],
    "gpt2": ["lm_head"],
    "t5": ["lm_head"],
    "vit": ["vit.embeddings.patch_embeddings.projection", "classifier"],
    "cifar_resnet": ["conv1", "fc"],
    "whisper": ["model.encoder.conv1", "model.encoder.conv2", "proj_out"],
    "llava": [
        "model.vision_tower.embeddings.patch_embedding",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "lm_head",
    ],
}


def setup(name):
    model = MODELS[name]().eval()
    structure = structure_of(model, include=["*"], exclude=EMBEDDINGS.get(name, []))
    plan = Plan(layers={layer.name: Prune(sparsity=0.5) for layer in structure.layers})
    return model, structure, plan, Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(3)), {})


def same(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


class Recording:
    """A solver that keeps the weight and the statistics it was shown of each matrix, and solves as another does."""

    name: ClassVar[str] = "recording"
    treats: ClassVar[frozenset] = frozenset({"prune"})
    every_pattern: ClassVar[bool] = True

    def __init__(self, solver):
        self.solver, self.needs, self.seen = solver, solver.needs, []

    def solve(self, weights, inputs, prunes, generators):
        self.seen += [(weight.clone(), inputs) for weight in weights]
        return self.solver.solve(weights, inputs, prunes, generators)


def rows_by_hook(model, layer, data):
    """(matrices, tokens, columns) float64: what a forward hook of the layer sees."""
    module, found = module_of(model, layer), []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(input_rows(module, layer, args[0]).double()))
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    handle.remove()
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("name", ALONE)
def test_their_statistics_are_those_of_a_forward_hook(name, solver, propagate):
    model, structure, plan, data = setup(name)
    assert [layer.name for layer in structure.outside] == ALONE[name]
    dense, recording = copy.deepcopy(model), Recording(solver)
    events = {
        one.layer: one
        for one in walk(model, plan, recording, data, settings=Settings(propagate=propagate), structure=structure)
        if isinstance(one, LayerSolved)
    }
    for layer in structure.outside:
        before = copy.deepcopy(dense)
        if (
            propagate == "compressed"
        ):  # all but this one as they are now; tokens were looked up before a tied head was pruned
            before.load_state_dict(model.state_dict())
            parameter_of(before, layer).data.copy_(parameter_of(dense, layer))
        rows = rows_by_hook(before, layer, data)
        weights = as_matrices(parameter_of(dense, layer).detach(), layer)
        for matrix, weight in enumerate(weights):
            (inputs,) = [inputs for shown, inputs in recording.seen if torch.equal(shown, weight)]
            gram = rows[matrix].T @ rows[matrix]
            assert inputs.tokens == rows.shape[1] > 0
            assert torch.allclose(inputs.squares.double(), gram.diagonal(), rtol=1e-4, atol=1e-5 * float(gram.max()))
            if solver.needs == "gram":
                assert torch.allclose(inputs.gram.double(), gram, rtol=1e-4, atol=1e-5 * float(gram.max()))
        assert events[layer.name].tokens == rows.shape[1]
        assert not events[layer.name].notes


@pytest.mark.parametrize("name", ["llama", "gpt2", "cifar_resnet", "whisper"])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, name):
    model, structure, plan, data = setup(name)
    again, whole = copy.deepcopy(model), copy.deepcopy(model)
    compress(whole, plan, solver=SparseGPT(), data=data, structure=structure)
    settings = Settings(work=str(tmp_path / "work"))
    solved = {layer.name for layer in structure.outside} - {"lm_head", "proj_out", "fc"} or set(plan.layers)
    for event in walk(model, plan, SparseGPT(), data, settings=settings, structure=structure):
        if isinstance(event, LayerSolved):
            solved.discard(event.layer)
        if not solved:
            break
    result = compress(again, plan, solver=SparseGPT(), data=data, settings=settings, structure=structure)
    assert same(again, whole)
    assert {one.layer for one in result.layers} == set(plan.layers)
    assert all(one.tokens for one in result.layers)


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_streamed_model_gets_the_same_bits(tmp_path, name, propagate):
    model, structure, plan, data = setup(name)
    model.save_pretrained(tmp_path / "dense")
    compress(model, plan, solver=Wanda(), data=data, settings=Settings(propagate=propagate), structure=structure)
    streamed = load_streamed(tmp_path / "dense")
    settings = Settings(propagate=propagate, work=str(tmp_path / "work"))
    result = compress(streamed, plan, solver=Wanda(), data=data, settings=settings, structure=structure)
    assert torch.equal(streamed.lm_head.weight, model.lm_head.weight)
    assert {one.layer: one.tokens for one in result.layers}["lm_head"] == 3 * 2 * (7 if name == "t5" else 12)


def test_padding_does_not_count_for_a_head():
    model, structure, plan, _ = setup("llama")
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    data = Batches(({"input_ids": ids, "attention_mask": mask},), {})
    result = compress(model, plan, solver=Wanda(), data=data, structure=structure)
    assert {one.tokens for one in result.layers} == {13}


def test_the_head_of_an_encoder_decoder_sees_the_decoders_tokens():
    model, structure, plan, data = setup("t5")
    ids = data[0]["input_ids"][:, :7]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": data[0]["decoder_input_ids"]}
    result = compress(model, plan, solver=Wanda(), data=Batches((inputs,), {}), structure=structure)
    tokens = {one.layer: one.tokens for one in result.layers}
    assert tokens["lm_head"] == tokens["decoder.block.1.layer.2.DenseReluDense.wo"] == 14
    assert tokens["encoder.block.1.layer.1.DenseReluDense.wo"] == 11
