"""LPViT's own score and curve: numbers worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.scores import block_means, official_curve, rank_one_costs, taylor_keep
from layerwise.scores.block_taylor import cropped, kept_count


def test_means_of_cut_blocks_are_over_what_they_hold():
    means = block_means(torch.arange(1.0, 31).reshape(5, 6), (2, 4))
    assert means.tolist() == [[5.5, 8.5], [17.5, 20.5], [26.5, 29.5]]
    keep = taylor_keep(means, 0.5)
    assert keep.flatten().tolist() == [False, False, False, True, True, True]
    assert int(cropped(keep, (2, 4), 5, 6).sum()) == 10


def test_rank_one_costs_worked_by_hand():
    weight, gradient = torch.tensor([1.0, 2, -1, 3]), torch.tensor([0.5, -1, 2, 1])
    assert (weight * gradient).abs().tolist() == [0.5, 2, 2, 3]
    steps = torch.diag(-weight)
    exact, official = rank_one_costs(steps, gradient), rank_one_costs(steps, gradient, official=True)
    assert exact.tolist() == pytest.approx([0.125, 1.125, 6.125, 0.125], abs=1e-5)
    assert official.tolist() == pytest.approx([0.375, 5.375, 14.375, 17.375], abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (5, 6)])
def test_the_curve_is_mean_squares_plus_the_officials_recursion(shape):
    draw = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(5, 6, generator=draw) for _ in range(2))
    curve = official_curve(weight, gradient, shape, steps=10)
    scores = block_means((weight * gradient).abs(), shape)
    masks = [cropped(taylor_keep(scores, i / 10), shape, 5, 6) for i in range(11)]
    deltas = torch.stack([(weight * mask - weight).flatten() for mask in masks])
    steps = torch.diff(deltas, dim=0, prepend=torch.zeros(1, 30))
    expected = rank_one_costs(steps, gradient.flatten(), official=True)
    expected += (deltas * gradient.flatten()).square().double().mean(1)
    assert curve == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-9)
    assert curve[0] == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_masks_are_nested_and_never_empty(rows, columns, seed, one, two, ties):
    draw = torch.Generator().manual_seed(seed)
    scores = (
        torch.randint(3, (rows, columns), generator=draw).double()
        if ties
        else torch.rand(rows, columns, generator=draw)
    )
    less, more = (taylor_keep(scores, gone) for gone in sorted((one, two)))
    assert not (more & ~less).any()
    for keep, gone in ((less, min(one, two)), (more, max(one, two))):
        assert int(keep.sum()) == max(1, round((1 - gone) * scores.numel()))
    assert taylor_keep(scores, 0.0).all()


def test_rounding_keeps_a_block():
    assert int((1 - 0.9) * 10) == 0
    assert kept_count(0.9, 10) == 1
    assert kept_count(1.0, 10) == 1
