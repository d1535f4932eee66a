import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ScoreError
from layerwise.io import load, load_streamed
from layerwise.scores import LOW_KEEPS, SCORES, WITHOUT_DATA, share_above, z_score
from layerwise.structure import structure_of
from models import MODELS
from tiny import tiny_llama


def test_worked_by_hand():
    weights = [torch.tensor([0.0, 0, 0, 1, 2, 9])]  # mean 2, deviation 3.214550
    assert share_above(weights) == 1 / 6
    assert share_above(weights, 7 / 3.2145) == 0
    assert share_above(weights, 7 / 3.2146) == 1 / 6
    symmetric = [torch.tensor([-3.0, -1, 0, 0, 0, 0, 1, 3])]
    assert share_above(symmetric) == 0.125
    assert share_above(symmetric, two_sided=True) == 0.25


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (lambda g: torch.randn(1_000_000, generator=g), 0.1587),
        (lambda g: torch.rand(1_000_000, generator=g), 0.2113),
        (lambda g: torch.empty(2, 500_000).exponential_(generator=g).diff(dim=0), 0.1216),  # Laplace
    ],
    ids=["normal", "uniform", "laplace"],
)
def test_shares_of_known_distributions(draw, share):
    assert share_above([draw(torch.Generator().manual_seed(0))]) == pytest.approx(share, abs=0.002)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([0.25, 1.0, 8.0]), st.integers(-5, 5), st.booleans())
def test_a_line_through_the_weights_changes_nothing(seed, scale, shift, two_sided):
    weights = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = share_above([weights], two_sided=two_sided)
    assert share_above([weights * scale + shift], two_sided=two_sided) == plain
    assert share_above(list(weights), two_sided=two_sided) == plain  # pooled: how they are cut is immaterial
    assert 0 <= plain <= 1


def test_far_from_zero_the_sums_hold():
    weights = torch.tensor([-3.0, -1, 0, 0, 0, 0, 1, 3], dtype=torch.float64) + 2.0**40
    assert share_above([weights]) == 0.125


@pytest.mark.parametrize(
    ("weights", "words"),
    [([], "no weights"), ([torch.tensor([1.0, math.nan])], "not finite"), ([torch.full((9,), 0.1)], "all 9 weights")],
)
def test_what_has_no_share_is_refused(weights, words):
    with pytest.raises(ScoreError, match=words):
        share_above(weights)


def test_pieces_of_a_large_tensor_count_as_one(monkeypatch):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 3
    whole = share_above([weights])
    away = weights.double() - weights.double().mean()
    assert whole == int((away > away.square().mean().sqrt()).sum()) / 1000
    monkeypatch.setitem(z_score.__globals__, "_PIECE", 7)
    assert share_above([weights]) == whole


def test_blocks_layers_and_both_readings():
    model = MODELS["llama"]()
    structure = structure_of(model)
    block = structure.blocks[1]
    weights = [model.get_parameter(layer.parameter).detach() for layer in block.layers]
    assert z_score(model, structure)[block.name] == share_above(weights)
    assert SCORES["z-score"](model, None, structure) == z_score(model, structure)
    assert "z-score" in WITHOUT_DATA & LOW_KEEPS
    each = z_score(model, structure, pooled=False)[block.name]
    assert each == pytest.approx(sum(share_above([one]) for one in weights) / len(weights), abs=1e-15)
    assert each != z_score(model, structure)[block.name]
    by_layer = z_score(model, structure, by="layer", two_sided=True)
    assert list(by_layer) == [layer.name for layer in structure.layers]
    assert by_layer[block.layers[0].name] == share_above(weights[:1], two_sided=True)


def test_norms_and_biases_have_no_part_in_it():
    model = MODELS["gpt2"]()
    plain = z_score(model, structure_of(model))
    everything = structure_of(model, include=["*", "*.ln_1"])
    assert any(layer.kind == "table" for layer in everything)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name or name.endswith("bias"):
                parameter.fill_(100.0)
    assert z_score(model, everything) == plain


def test_of_experts_each_is_a_matrix():
    model = MODELS["mixtral"]()
    got = z_score(model, structure_of(model), pooled=False)
    assert all(0.1 < share < 0.25 for share in got.values())


def test_a_block_that_breaks_is_named():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ScoreError, match=r'block "model\.layers\.1": a weight is not finite'):
        z_score(model, structure_of(model))


def test_a_streamed_model_has_the_same_shares(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    whole, streamed = load(folder), load_streamed(folder)
    assert z_score(streamed, structure_of(streamed)) == z_score(whole, structure_of(whole))
