"""What the zeros of a matrix look like: worked by hand, and whoever made them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ShapeError
from layerwise.runtime import zeros_of
from layerwise.runtime.zeros import keeps_two_of_four, needed_columns


def blocks(rows, columns, height, width, density, seed=0):
    """Ones in random blocks, cut where they do not divide."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // height), -(-columns // width), generator=draw) < density
    return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns].float()


@pytest.mark.parametrize("side", [8, 16, 32])
def test_square_blocks_are_found_at_their_size(side):
    found = zeros_of(blocks(256, 192, side, side, 0.3))
    assert (found.block, found.height) == (side, side)
    assert found.stored == found.gathered == pytest.approx(found.density)
    assert f"blocks of {side} × {side}" in found.words()


def test_groups_of_four_rows_are_no_blocks():
    found = zeros_of(blocks(128, 128, 4, 1, 0.2))
    assert (found.height, found.gathered) == (4, pytest.approx(found.density))
    assert found.stored > 0.9
    assert "groups of 4 rows" in found.words()


def test_sizes_that_do_not_divide():
    found = zeros_of(blocks(100, 61, 16, 16, 0.3))
    assert found.block is None
    assert found.height == 16
    # the last group has 4 rows, and is stored as one of 16
    assert found.gathered >= found.density
    assert needed_columns(torch.ones(5, 3, dtype=torch.bool), 4).shape == (2, 3)


def test_whole_rows_and_columns():
    weight = torch.ones(6, 4)
    weight[1], weight[4], weight[:, 2] = 0, 0, 0
    found = zeros_of(weight)
    assert found.kept_rows.tolist() == [0, 2, 3, 5]
    assert found.kept_columns.tolist() == [0, 1, 3]
    assert found.narrower
    assert found.words() == "50.0% kept, 2 rows zero, 1 columns zero"
    assert not zeros_of(torch.ones(3, 3)).narrower


def test_nothing_but_zeros_and_nothing_at_all():
    assert zeros_of(torch.zeros(5, 3)).density == 0
    assert zeros_of(torch.zeros(5, 3)).kept_rows.numel() == 0
    assert zeros_of(torch.zeros(0, 3)).density == 0
    with pytest.raises(ShapeError, match="a matrix is needed"):
        zeros_of(torch.zeros(2, 2, 2))


@given(st.lists(st.sampled_from(range(16)), min_size=1, max_size=12))
def test_two_of_four_by_counting(masks):
    """Each group of four is one number whose bits say what is kept: 0, 1 or 2 may be, 3 or 4 may not."""
    row = torch.tensor([[float(mask >> bit & 1) for mask in masks for bit in range(4)]])
    assert keeps_two_of_four(row) == all(bin(mask).count("1") <= 2 for mask in masks)
    assert not keeps_two_of_four(torch.zeros(1, 4 * len(masks) + 1))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_a_group_reads_what_one_of_its_rows_needs(rows, columns, height, seed):
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.1
    expected = torch.stack([kept[start : start + height].any(0) for start in range(0, rows, height)])
    assert torch.equal(needed_columns(kept, height), expected)
    found = zeros_of(kept.float())
    assert found.density <= found.stored
    assert found.density <= found.gathered
