"""Taylor scores of heads and channels: identities of signed sums, credits under grouped queries, forms."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ScoreError
from layerwise.scores.gradients import gradients
from layerwise.scores.units import _folded, magnitudes, sums, unit_scores, unit_taylor
from layerwise.structure import Part, coupled_groups, structure_of
from models import DECODER, MODELS, inputs_for, small_llama


def grouped():
    """6 query heads to 2 key heads."""
    model = small_llama(
        **{**DECODER, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    )
    return model, structure_of(model), coupled_groups(model).groups


def text(model, count=2):
    return [inputs_for("llama", model, seed=seed) for seed in range(count)]


def test_signed_sums_agree_where_what_is_written_is_read():
    """Check 5: in float64, rows of up against columns of down, of v against o, of q against k. They fail for heads taken by modulo."""
    model, structure, groups = grouped()
    model, batch = model.double(), text(model, 1)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    found = gradients(model, [batch], structure)  # the same, rounded to float32
    for layer in structure:
        torch.testing.assert_close(found[layer.name], model.get_parameter(layer.parameter).grad.float())

    def signed(group, role, modulo=False):
        one = next(member for member in group.parts if f".{role}_proj." in member.parameter)
        weight = model.get_parameter(one.parameter)
        return sums(weight.detach() * weight.grad, _folded(one, group) if modulo else one)

    heads = next(group for group in groups if group.kind == "heads")
    channels = next(group for group in groups if group.kind == "channels")
    close = {"rtol": 1e-10, "atol": 1e-15}
    torch.testing.assert_close(signed(channels, "up"), signed(channels, "down"), **close)
    torch.testing.assert_close(signed(heads, "v"), signed(heads, "o"), **close)
    torch.testing.assert_close(signed(heads, "q"), signed(heads, "k"), **close)
    assert not torch.allclose(signed(heads, "q", modulo=True), signed(heads, "k"), **close)


@pytest.mark.parametrize("role", ["q", "o"])
def test_query_heads_are_credited_to_the_head_they_are_cut_with(role):
    """Check 6: all of it on one query head; the official fold credits a mod K."""
    model, _, groups = grouped()
    heads = next(group for group in groups if group.kind == "heads")
    name = next(one.parameter for one in heads.parts if f".{role}_proj." in one.parameter)
    for modulo, expected in ((False, [0, 0, 0, 1, 1, 1]), (True, [0, 1, 0, 1, 0, 1])):
        credited = []
        for head in range(6):
            mask = torch.zeros(model.get_parameter(name).shape)
            rows = slice(8 * head, 8 * head + 8)
            mask[(rows if role == "q" else slice(None)), (slice(None) if role == "q" else rows)] = 1.0
            worth = lambda own, values, mask=mask: mask if own == name else torch.zeros_like(values)  # noqa: E731
            scores = unit_scores(model, [heads], worth, modulo=modulo)[heads.name]
            credited.append(int(scores.argmax()))
            assert int((scores > 0).sum()) == 1
        assert credited == expected


def test_sums_worked_by_hand():
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    by_rows = Part("w", 0, torch.tensor([[0, 2], [1, 3]]), "out")
    assert sums(values, by_rows).tolist() == [14, 22]
    assert sums(values, Part("w", 1, torch.tensor([[1], [0]]), "in")).tolist() == [20, 16]


def test_forms():
    model, structure, groups = grouped()
    data = text(model)
    first = unit_taylor(model, data, groups, structure)
    vector = unit_taylor(model, data, groups, structure, form="vectorize")
    second = unit_taylor(model, data, groups, structure, form="second")
    mixed = unit_taylor(model, data, groups, structure, form="mixed")
    for name, scores in first.items():
        assert (vector[name] <= scores * (1 + 1e-5) + 1e-9).all()
        assert (second[name] > 0).all()
        # g^2 is small beside g (issue 23 of LLM-Pruner): mixed is first, but that its gradients are means over batches
        torch.testing.assert_close(mixed[name] * len(data), scores, rtol=0.2, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 5e4])  # at the second the gradients of blocks are above the largest float16
def test_float16_models_are_scored_in_float32(scale):
    model, structure, groups = grouped()
    with torch.no_grad():
        if scale > 1:
            model.model.embed_tokens.weight.mul_(1e-3)
            model.lm_head.weight.mul_(scale)
            for block in model.model.layers:
                block.mlp.down_proj.weight.mul_(1e-3)
                block.self_attn.o_proj.weight.mul_(1e-3)
    data, half = text(model), model.half()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    scores = unit_taylor(half, data, groups, structure)
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
    assert half.dtype == torch.float16
    for name, wide in unit_taylor(copy.deepcopy(half).float(), data, groups, structure).items():
        torch.testing.assert_close(scores[name], wide)


def test_more_batches_alike_change_no_order_and_half_precision_does_not_underflow():
    model, structure, groups = grouped()
    one, four = (unit_taylor(model, text(model, 1) * count, groups, structure) for count in (1, 4))
    for name in one:
        torch.testing.assert_close(four[name], 4 * one[name], rtol=1e-6, atol=0)
    low = unit_taylor(model.bfloat16(), text(model, 1), groups, structure)
    for name in one:
        assert (low[name] > 0).all()
        torch.testing.assert_close(low[name], one[name], rtol=0.3, atol=1e-3)


def permuted(model, group, seed):
    """The order in which the units of a group now lie."""
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for one in group.parts:
            parameter = model.get_parameter(one.parameter)
            moved = parameter.index_select(one.dim, one.index[order].flatten())
            parameter.index_copy_(one.dim, one.index.flatten(), moved)
    return order


@given(st.integers(0, 1000))
def test_permuting_channels_permutes_scores(seed):
    model, _, groups = grouped()
    channels = next(group for group in groups if group.kind == "channels")
    before = magnitudes(model, [channels])[channels.name]
    order = permuted(model, channels, seed)
    torch.testing.assert_close(magnitudes(model, [channels])[channels.name], before[order])


def test_permuting_heads_and_channels_permutes_taylor_scores():
    """Check 8: the function is the same, so its gradients go along; query heads with the key head that they read."""
    model, structure, groups = grouped()
    before = unit_taylor(model, text(model), groups, structure)
    orders = {group.name: permuted(model, group, 1) for group in groups}
    assert any(order.tolist() == [1, 0] for order in orders.values())
    after = unit_taylor(model, text(model), groups, structure)
    for name, order in orders.items():
        torch.testing.assert_close(after[name], before[name][order], rtol=1e-4, atol=1e-9)


def test_fused_experts_are_scored_over_all_experts():
    model = MODELS["mixtral"]()
    group = next(one for one in coupled_groups(model).groups if one.kind == "channels")
    found = magnitudes(model, [group])[group.name]
    experts = model.model.layers[0].mlp.experts
    expected = (
        experts.gate_up_proj.square().sum((0, 2)).view(2, -1).sum(0) + experts.down_proj.square().sum((0, 1))
    ).detach()
    torch.testing.assert_close(found, expected)


def test_scores_that_are_not_finite_are_an_error():
    model, _, groups = grouped()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoreError, match=r"model\.layers\.0\.mlp"):
        magnitudes(model, groups)
