"""Magnitude, Wanda and random: masks only, so every kept weight stays as it was, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import ConfigError, ShapeError, SolveError
from layerwise.passes.statistics import InputStatistics
from layerwise.plan import Prune
from layerwise.randomness import generator_for
from layerwise.solvers import Magnitude, Random, Solved, Solver, Wanda

torch.set_num_threads(1)

W = torch.tensor(
    [
        [0.5, -1, 0.2, 0.8, -0.3, 0.1],
        [-0.4, 0.3, 0.9, -0.1, 0.6, -0.7],
        [1.2, 0.05, -0.6, 0.4, -0.2, 0.3],
        [0.15, -0.5, 0.7, -0.9, 0.25, 0.45],
    ]
)
X = torch.tensor([[1.0, 0, 2, -1, 0.5, 0], [0, 1, -1, 2, 0.5, 0], [2, -1, 0, 1, -0.5, 0], [1, 1, 1, 0, 1, 0]])
EVERY = [Magnitude(), Magnitude(compare="row"), Random(), Wanda(), Wanda(compare="layer")]
ids = [f"{s.name}-{getattr(s, 'compare', '')}" for s in EVERY]


def statistics(rows: Tensor, gram: bool = False) -> InputStatistics:
    return InputStatistics(len(rows), rows.square().sum(0), rows.T @ rows if gram else None)


def solve(solver: Solver, weight: Tensor, prune: Prune, rows: Tensor | None = None, seed: int = 0) -> Solved:
    inputs = None if solver.needs == "none" else statistics(X if rows is None else rows)
    (solved,) = solver.solve([weight], inputs, [prune], [generator_for(seed, "layer")])
    return solved


def pruned_columns(solved: Solved) -> list[list[int]]:
    return [(~row).nonzero().flatten().tolist() for row in solved.keep]


HALF = Prune(sparsity=0.5)
WANDA_HALF = [[2, 4, 5], [1, 3, 5], [1, 4, 5], [0, 4, 5]]


def test_wanda_worked_by_hand():
    assert statistics(X).squares.tolist() == [6, 3, 6, 6, 1.75, 0]
    score = (W.abs() * statistics(X).squares.sqrt())[0, 0]
    assert score.item() == pytest.approx(1.224745, abs=1e-6)
    assert pruned_columns(solve(Wanda(), W, HALF)) == WANDA_HALF
    assert pruned_columns(solve(Wanda(reference=True), W, HALF)) == WANDA_HALF
    # the official statistic of two sequences of two tokens is half of it: no difference to the mask
    halved = InputStatistics(4, torch.tensor([3, 1.5, 3, 3, 0.875, 0]))
    (from_halves,) = Wanda().solve([W], halved, [HALF], [torch.Generator()])
    assert pruned_columns(from_halves) == WANDA_HALF


def test_wanda_per_layer_is_exact_and_the_reference_prunes_one_more():
    exact, reference = solve(Wanda("layer"), W, HALF), solve(Wanda("layer", reference=True), W, HALF)
    assert pruned_columns(exact) == WANDA_HALF
    assert pruned_columns(reference) == [[2, 4, 5], [1, 3, 4, 5], [1, 4, 5], [0, 4, 5]]
    scores = W.abs() * statistics(X).squares.sqrt()
    assert scores.flatten().sort().values[12].item() == pytest.approx(0.793725, abs=1e-6)


def test_magnitude_keeps_what_the_reference_prunes_at_the_threshold():
    exact, reference = solve(Magnitude(), W, HALF), solve(Magnitude(reference=True), W, HALF)
    assert (~exact.keep).sum() == 12
    assert (~reference.keep).sum() == 13
    assert (exact.keep != reference.keep).nonzero().tolist() == [[3, 5]]  # the weight of .45
    assert W.abs().flatten().sort().values[12].item() == pytest.approx(0.45)


def test_wanda_2_4_worked_by_hand():
    solved = solve(Wanda(), W[:, :4], Prune(sparsity=0.5, pattern="2:4"), X[:, :4])
    assert pruned_columns(solved) == [[0, 2], [1, 3], [1, 3], [0, 1]]
    reference = solve(Wanda(reference=True), W[:, :4], Prune(sparsity=0.5, pattern="2:4"), X[:, :4])
    assert torch.equal(reference.keep, solved.keep)


def test_reference_rounds_down_in_each_row_and_prunes_the_lower_index_of_ties():
    ones, prune = torch.ones(3, 6), Prune(sparsity=0.7)
    reference = solve(Wanda(reference=True), ones, prune, torch.ones(2, 6))
    assert pruned_columns(reference) == [[0, 1, 2, 3]] * 3  # 12 of 18 = 0.667
    exact = solve(Wanda(), ones, prune, torch.ones(2, 6))
    assert [len(row) for row in pruned_columns(exact)] == [4, 5, 4]  # 13 = round(12.6), carried over the rows
    assert pruned_columns(exact)[0] == [2, 3, 4, 5]
    assert not solve(Magnitude(reference=True), ones, prune).keep.any()  # every tie goes
    assert not solve(Magnitude(reference=True), ones, Prune(sparsity=1)).keep.any()  # the official code stops here


@pytest.mark.parametrize("solver", EVERY, ids=ids)
@pytest.mark.parametrize("pattern", ["unstructured", "row", "column", "block(2x3)"])
def test_nothing_and_everything(solver, pattern):
    weight = W.clone()
    weight[0, 0] = -0.0
    none = solve(solver, weight, Prune(sparsity=0, pattern=pattern))
    assert none.weight.numpy().tobytes() == weight.numpy().tobytes()
    assert none.keep.all()
    everything = solve(solver, weight, Prune(sparsity=1, pattern=pattern))
    assert everything.weight.numpy().tobytes() == bytes(4 * 24)  # no negative zeros
    assert not everything.keep.any()


@pytest.mark.parametrize("solver", EVERY, ids=ids)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    sparsity=st.floats(0, 1),
    values=st.sampled_from([2, 4, 1000]),
)
def test_counts_are_exact_and_kept_weights_untouched(solver, seed, rows, columns, sparsity, values):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-values, values + 1, (rows, columns), generator=generator) / 7
    inputs = torch.randint(-2, 3, (5, columns), generator=generator).float()
    solved = solve(solver, weight, Prune(sparsity=sparsity), inputs, seed)
    assert (~solved.keep).sum() == round(sparsity * weight.numel())
    assert torch.equal(solved.weight[solved.keep], weight[solved.keep])
    assert not solved.weight[~solved.keep].any()
    if getattr(solver, "compare", "") == "row":
        counts = (~solved.keep).sum(1)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("solver", EVERY, ids=ids)
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("row", 0.5), ("column", 0.34), ("block(2x3)", 0.75), ("1:3", 2 / 3), ("2:6", 2 / 3)]
)
def test_patterns_have_exact_counts(solver, pattern, sparsity):
    keep = solve(solver, W, Prune(sparsity=sparsity, pattern=pattern)).keep
    if pattern == "row":
        assert sorted(keep.sum(1).tolist()) == [0, 0, 6, 6]
    elif pattern == "column":
        assert sorted(keep.sum(0).tolist()) == [0, 0, 4, 4, 4, 4]
    elif pattern == "block(2x3)":
        assert sorted(keep.reshape(2, 2, 2, 3).sum((1, 3)).flatten().tolist()) == [0, 0, 0, 6]
    else:
        n, m = Prune(sparsity=sparsity, pattern=pattern).nm
        assert (keep.reshape(4, -1, m).sum(-1) == n).all()


def test_rows_go_by_their_summed_squared_score():
    # squares of |W| * norm by row: 6(.25+.04+.64)+3+1.75*.09 = 8.7375; 7.74; 12.01...; 9.74...
    assert solve(Wanda(), W, Prune(sparsity=0.25, pattern="row")).keep.all(1).tolist() == [True, False, True, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["row", "layer"]), st.floats(0.05, 0.95))
def test_wanda_mask_does_not_change_with_scale_or_order_and_follows_a_permutation(seed, compare, sparsity):
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(6, 10, generator=generator), torch.randn(9, 10, generator=generator)
    prune, solver = Prune(sparsity=sparsity), Wanda(compare)
    keep = solve(solver, weight, prune, inputs).keep
    assert torch.equal(solve(solver, weight, prune, inputs * 8).keep, keep)
    if compare == "row":
        assert torch.equal(solve(solver, weight * torch.tensor([[1.0, 2, 4, 8, 0.5, 16]]).T, prune, inputs).keep, keep)
    assert torch.equal(solve(solver, weight, prune, inputs.flip(0)).keep, keep)
    order = torch.randperm(10, generator=generator)
    assert torch.equal(solve(solver, weight[:, order], prune, inputs[:, order]).keep, keep[:, order])


@pytest.mark.parametrize("pattern", ["unstructured", "1:3"])
def test_wanda_without_tokens_prunes_by_magnitude_and_says_so(pattern):
    prune = Prune(sparsity=0.5 if pattern == "unstructured" else 2 / 3, pattern=pattern)
    unseen = InputStatistics(0, torch.zeros(6))
    (solved,) = Wanda().solve([W], unseen, [prune], [torch.Generator()])
    assert solved.notes == ("no calibration token reached it: pruned by magnitude",)
    assert torch.equal(solved.keep, solve(Magnitude("row"), W, prune).keep)
    (dark,) = Wanda().solve([W], InputStatistics(3, torch.zeros(6)), [prune], [torch.Generator()])
    assert dark.notes == ("its inputs are zero on all calibration tokens: pruned by magnitude",)
    assert torch.equal(dark.keep, solved.keep)


@pytest.mark.parametrize("compare", ["row", "layer"])
def test_inputs_that_were_always_zero_go_first_the_smallest_weights_before(compare):
    weight, inputs = torch.tensor([[1.0, 3, 2, 1e-3], [4, 1, 2, 1e-3]]), torch.tensor([[0.0, 0, 0, 1]])
    solved = solve(Wanda(compare), weight, HALF, inputs)
    assert pruned_columns(solved) == [[0, 2], [1, 2]]
    assert pruned_columns(solve(Wanda(reference=True), weight, HALF, inputs)) == [[0, 1], [0, 1]]  # by position


def test_error_is_the_change_of_the_outputs_where_the_gram_is_known():
    (known,) = Wanda().solve([W], statistics(X, gram=True), [HALF], [torch.Generator()])
    change = (W - known.weight).double() @ X.double().T
    assert known.error == pytest.approx(change.square().sum().item(), rel=1e-5)
    assert solve(Wanda(), W, HALF).error is None


def test_random_is_its_stream():
    first, again, other = (solve(Random(), W, HALF, seed=seed).keep for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    share = np.mean([solve(Random(), W, HALF, seed=seed).keep.numpy() for seed in range(400)], axis=0)
    assert abs(share - 0.5).max() < 0.12  # 4.8 standard deviations


@pytest.mark.parametrize("solver", EVERY, ids=ids)
def test_bad_weights_and_shapes_are_named(solver):
    weight = W.clone()
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with pytest.raises(SolveError, match="weight has 3 non-finite values"):
        solve(solver, weight, HALF)
    with pytest.raises(ShapeError, match="6 inputs do not split into groups of 4"):
        solve(solver, W, Prune(sparsity=0.5, pattern="2:4"))
    with pytest.raises(ShapeError, match="not a matrix"):
        solve(solver, W[0], HALF)


def test_bad_settings_and_missing_data():
    with pytest.raises(ConfigError, match=r'Wanda.compare="column": give "row" or "layer"'):
        Wanda(compare="column")
    with pytest.raises(ConfigError, match="Wanda needs calibration data"):
        Wanda().solve([W], None, [HALF], [torch.Generator()])
    with pytest.raises(SolveError, match="1 of 6 inputs are not finite"):
        Wanda().solve([W], InputStatistics(1, torch.tensor([1, 1, 1, 1, 1, torch.nan])), [HALF], [torch.Generator()])
    with pytest.raises(ShapeError, match="6 columns does not fit statistics of 3 inputs"):
        Wanda().solve([W], InputStatistics(1, torch.ones(3)), [HALF], [torch.Generator()])


def test_several_matrices_each_get_their_own_treatment():
    prunes = [Prune(sparsity=0.25), Prune(sparsity=1 / 3, pattern="2:3"), Prune(sparsity=0.5, pattern="row")]
    generators = [generator_for(0, name) for name in "abc"]
    together = Wanda().solve([W, W[:2], W * 2], statistics(X), prunes, generators)
    alone = [solve(Wanda(), w, p) for w, p in zip([W, W[:2], W * 2], prunes, strict=True)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(together, alone, strict=True))
