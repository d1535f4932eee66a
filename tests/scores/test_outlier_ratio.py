import copy
import gc
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ConfigError, ScoreError
from layerwise.scores import outlier_ratio, outlier_share
from layerwise.structure import module_of, structure_of
from layerwise.tasks.batches import Batches, call
from models import MODELS, inputs_for


def batches_for(name, model, count=2):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(count)), {})


def test_worked_by_hand():  # mean 2.5, five times that 12.5: 13 alone is above
    scores = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 13])
    assert outlier_share([scores], 5.0) == 0.125
    assert outlier_share([scores[:3].reshape(3, 1), scores[3:]], 5.0) == 0.125
    assert outlier_share([scores], 5.2) == 0.0  # 13 is not above 13


def test_alike_or_all_zero_has_no_outliers():
    assert outlier_share([torch.ones(4, 5)], 1.5) == 0.0
    assert outlier_share([torch.zeros(4, 5)], 1.5) == 0.0


def test_what_cannot_be_scored_is_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ScoreError, match="not finite"):
            outlier_share([torch.ones(3), torch.tensor([1.0, bad])], 5.0)
    with pytest.raises(ScoreError, match="no scores"):
        outlier_share([], 5.0)
    for factor in (1.0, 0.5, float("nan")):
        with pytest.raises(ConfigError, match="factor > 1"):
            outlier_share([torch.ones(3)], factor)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30), st.floats(1.1, 20), st.randoms())
def test_neither_order_nor_split_nor_scale_matters(values, factor, random):
    scores = torch.tensor(values, dtype=torch.float64)
    pooled = scores.mean().item()
    if (abs(scores - factor * pooled) <= 1e-9 * (1 + factor * pooled)).any():
        return  # on the very threshold rounding decides
    share = outlier_share([scores], factor)
    assert share == (scores > factor * pooled).double().mean().item()
    assert 0 <= share < 1 / factor + 1e-12  # Markov's inequality
    random.shuffle(values)
    cut = len(values) // 2
    shuffled = torch.tensor(values, dtype=torch.float64)
    assert outlier_share([shuffled[:cut] * 4, shuffled[cut:] * 4], factor) == share


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "cifar_resnet"])
def test_ratios_equal_those_of_a_naive_reference(name):
    model, factor = MODELS[name](), 2.0
    data, structure = batches_for(name, model), structure_of(model)
    norms, handles = {}, []
    for layer in structure:

        def keep(module, args, layer=layer):
            x = args[0]
            if layer.kind == "conv":
                x = torch.nn.functional.unfold(x, module.kernel_size, 1, module.padding, module.stride).transpose(1, 2)
            squares = x.reshape(-1, layer.columns).double().square().sum(0)
            norms[layer.name] = norms.get(layer.name, 0) + squares

        handles.append(module_of(model, layer).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    for handle in handles:
        handle.remove()
    expected = {}
    for block in structure.blocks:
        pooled = []
        for layer in block.layers:
            weight = module_of(model, layer).weight.detach().double()
            weight = weight.T if layer.transposed else weight.reshape(layer.rows, layer.columns)
            pooled.append((weight.abs() * norms[layer.name].sqrt()).flatten())
        pooled = torch.cat(pooled)
        expected[block.name] = (pooled > factor * pooled.mean()).double().mean().item()
    got = outlier_ratio(model, data, structure, factor)
    assert list(got) == [block.name for block in structure.blocks]
    sizes = {block.name: sum(layer.size for layer in block.layers) for block in structure.blocks}
    for block, ratio in got.items():
        assert 0 < ratio < 1
        assert ratio == pytest.approx(
            expected[block], abs=2 / sizes[block]
        )  # a score on the threshold may fall either way


def test_experts_that_saw_no_token_are_left_out():
    model = MODELS["mixtral"]()
    ids = torch.full((1, 2), 5)
    data, structure = Batches(({"input_ids": ids},), {}), structure_of(model)
    got = outlier_ratio(model, data, structure, 2.0)
    unseen = copy.deepcopy(model)
    experts = next(layer for layer in structure.blocks[0].layers if layer.kind == "experts")
    seen = _experts_seen(model, data, experts)
    assert 0 < len(seen) < experts.matrices
    with torch.no_grad():  # huge weights where no token goes change nothing
        for layer in structure.blocks[0].layers:
            if layer.kind == "experts":
                idle = [index for index in range(layer.matrices) if index not in seen]
                unseen.get_parameter(layer.parameter)[idle] = 1e6
    assert outlier_ratio(unseen, data, structure, 2.0) == got


def _experts_seen(model, data, layer):
    chosen = set()
    handle = module_of(model, layer).register_forward_pre_hook(
        lambda _, args: chosen.update(args[1].flatten().tolist())
    )
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    handle.remove()
    return chosen


def test_the_block_with_weights_that_are_not_finite_is_named():
    model = MODELS["llama"]()
    structure = structure_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoreError, match=r'block "model.layers.1": .*not finite'):
        outlier_ratio(model, batches_for("llama", model), structure, 5.0)


def test_blocks_without_layers_are_not_scored():
    model = MODELS["llama"]()
    structure = structure_of(model, exclude=["model.layers.0.*"])
    assert list(outlier_ratio(model, batches_for("llama", model), structure, 2.0)) == ["model.layers.1"]


def test_only_the_layers_up_for_compression_count():
    model = MODELS["llama"]()
    data = batches_for("llama", model)
    structure = structure_of(model, include=["*.mlp.down_proj"])
    got = outlier_ratio(model, data, structure, 2.0)
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed.model.layers[1].mlp.down_proj.weight[0, :8] *= 100
    other = outlier_ratio(changed, data, structure, 2.0)
    assert other["model.layers.0"] == got["model.layers.0"]
    assert other["model.layers.1"] != got["model.layers.1"]


class TwoMatrices(torch.nn.Module):
    """q and u look at the block's own input; what they say is not passed on, so that every block sees the same."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(2)
        self.q, self.u = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
        self.o = torch.nn.Linear(3, 2, bias=False)  # is not scored

    def forward(self, x):
        return x + 0 * self.norm(self.q(x)) + 0 * self.o(self.u(x))


def test_one_mean_for_all_matrices_of_a_block_worked_by_hand():
    """Squares of the inputs 3 and 8 in all, (1.5, 4) a sequence; the mean of the ten scores is 1.39453 there, the outlier 8 * sqrt(1.5)."""
    model = torch.nn.Sequential(TwoMatrices(), TwoMatrices())
    with torch.no_grad():
        for block in model:
            block.q.weight.copy_(torch.eye(2))
            block.u.weight.copy_(torch.tensor([[0.1, 0.1], [-8, 0.2], [0, 0.1]]))
    tokens = torch.tensor([[[1.0, 0], [1, 2]], [[0, 0], [1, 2]]])
    data, structure = Batches(tuple({"input": one[None]} for one in tokens), {}), structure_of(model, exclude=["*.o"])
    root = torch.tensor([1.5, 4.0]).sqrt()
    scores = [block_weight.abs() * root for block_weight in (model[0].q.weight.detach(), model[0].u.weight.detach())]
    assert torch.cat([one.flatten() for one in scores]).mean().item() == pytest.approx(1.39453, abs=2e-5)
    for factor in (3.0, 5.0):
        assert outlier_ratio(model, data, structure, factor) == {"0": 0.1, "1": 0.1}
        assert outlier_share(scores, factor) == 0.1
    # a mean for each matrix would say 0 and 1 of 6 instead
    assert [outlier_share([one], 3.0) for one in scores] == [0.0, pytest.approx(1 / 6)]
    twice = Batches(tuple({"input": 2 * one[None]} for one in tokens), {})
    with torch.no_grad():
        model[0].q.weight.mul_(10)
        model[0].u.weight.mul_(10)
    assert outlier_ratio(model, twice, structure, 3.0) == {"0": 0.1, "1": 0.1}


def test_the_scores_of_one_matrix_are_held_at_a_time(monkeypatch):
    """Counted where they are made: the next is asked for after the one before is gone."""
    module = sys.modules["layerwise.scores.outlier_ratio"]
    real, alive, most = module._scores, weakref.WeakSet(), []

    def counted(*args):
        for score in real(*args):
            alive.add(score)
            yield score
            del score
            gc.collect()
            most.append(len(alive))

    monkeypatch.setattr(module, "_scores", counted)
    model = MODELS["llama"]()
    outlier_ratio(model, batches_for("llama", model), structure_of(model), 2.0)
    assert len(most) == 2 * len(structure_of(model).layers)  # for the mean, and for the count
    assert max(most) <= 1
