import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import ShapeError
from layerwise.solvers.select import CHUNK, keep_blocks, keep_lowest_out, keep_nm, keep_per_row, spread

torch.set_num_threads(1)


def keep_by_sort(scores: Tensor, pruned: int) -> Tensor:
    """The oracle: a stable sort of everything."""
    order = scores.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[: scores.numel() - pruned]] = True
    return keep.reshape(scores.shape)


def keep_nm_by_sort(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.reshape(scores.shape[0], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :n], True).reshape(scores.shape)


def drawn(seed: int, *shape: int, values: int) -> Tensor:
    """Few values: many ties; `values` 0: no ties."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(values, shape, generator=generator).float() if values else torch.rand(shape, generator=generator)
    )


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.floats(0, 1))
def test_spread_is_exact_and_never_a_whole_unit_off(sizes, fraction):
    total = round(fraction * sum(sizes))
    shares = spread(total, sizes)
    assert sum(shares) == total
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if sum(sizes):
        assert all(abs(share - total * size / sum(sizes)) <= 1 for share, size in zip(shares, sizes, strict=True))


def test_spread_worked_by_hand():
    assert spread(7, [6, 6, 6]) == [2, 3, 2]  # ends at 2.33, 4.67, 7
    assert spread(3, [128, 128, 64]) == [1, 1, 1]
    assert spread(0, [0, 0]) == [0, 0]


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0, 1, 2, 3]), st.floats(0, 1))
def test_lowest_out_equals_a_stable_sort(seed, rows, columns, values, fraction):
    scores = drawn(seed, rows, columns, values=values)
    pruned = round(fraction * scores.numel())
    keep = keep_lowest_out(scores, pruned)
    assert torch.equal(keep, keep_by_sort(scores, pruned))
    assert torch.equal(keep_lowest_out(scores.T, pruned), keep_by_sort(scores.T, pruned))  # not contiguous


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0, 1, 2, 3]), st.lists(st.integers(0, 9), max_size=6))
def test_per_row_equals_a_stable_sort_of_each(seed, columns, values, counts):
    counts = [min(count, columns) for count in counts]
    scores = drawn(seed, len(counts), columns, values=values)
    expected = [keep_by_sort(row, count) for row, count in zip(scores, counts, strict=True)]
    keep = keep_per_row(scores, counts)
    assert keep.shape == scores.shape
    assert all(torch.equal(row, want) for row, want in zip(keep, expected, strict=True))


def test_infinite_scores_are_ties_like_any_other():
    inf = float("inf")
    assert keep_lowest_out(torch.tensor([[inf, inf], [1.0, inf]]), 2).tolist() == [[True, True], [False, False]]
    assert keep_per_row(torch.tensor([[-inf, -inf, 1.0]]), [1]).tolist() == [[True, False, True]]
    assert keep_per_row(torch.tensor([[-inf, -inf, 1.0]]), [0]).all()


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 3), (1, 1), (5, 20), (17, 18)]),
    st.sampled_from([0, 2, 3]),
)
def test_nm_keeps_n_of_every_m(seed, nm, values):
    n, m = nm
    scores = drawn(seed, 5, 4 * m, values=values)
    keep = keep_nm(scores, n, m)
    assert (keep.reshape(5, 4, m).sum(-1) == n).all()
    assert torch.equal(keep, keep_nm_by_sort(scores, n, m))


def test_nm_over_several_chunks():
    scores = drawn(0, 9, CHUNK, values=3)
    assert torch.equal(keep_nm(scores, 2, 4), keep_nm_by_sort(scores, 2, 4))


def test_nm_that_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match=r"10 inputs do not split into groups of 4\. Leave this layer out"):
        keep_nm(torch.zeros(3, 10), 2, 4)


def test_blocks_worked_by_hand():
    scores = torch.tensor([[3.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 9], [2, 2, 0, 0]])  # sums of squares 9, 4, 16, 81
    keep = keep_blocks(scores, 0.5, 2, 2)
    assert keep.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert keep_blocks(scores, 0.25, 1, 4)[:, 0].tolist() == [True, False, True, True]  # rows: 11, 2, 89, 8
    with pytest.raises(ShapeError, match=r"block\(3x2\): a weight of 4x4"):
        keep_blocks(scores, 0.5, 3, 2)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 8), (6, 1), (2, 2), (3, 4)]),
    st.floats(0, 1),
    st.sampled_from([1, 2, 0]),
)
def test_blocks_go_whole_and_by_count(seed, block, sparsity, values):
    keep = keep_blocks(drawn(seed, 6, 8, values=values), sparsity, *block)
    grid = keep.reshape(6 // block[0], block[0], 8 // block[1], block[1]).float().mean((1, 3))
    assert ((grid == 0) | (grid == 1)).all()
    assert int((grid == 0).sum()) == round(sparsity * grid.numel())
