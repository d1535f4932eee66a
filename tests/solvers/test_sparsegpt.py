"""SparseGPT against worked numbers, the explicit inverse, a plain float64 form of the official code, and itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import ConfigError, ShapeError, SolveError
from layerwise.passes.statistics import InputStatistics
from layerwise.plan import Prune
from layerwise.solvers import Magnitude, Solved, SparseGPT
from layerwise.solvers.factor import factorise

torch.set_num_threads(1)

H = torch.tensor([[4.0, 2, 0, 1], [2, 5, 1, 0], [0, 1, 3, 1], [1, 0, 1, 6]])
W = torch.tensor([[1.0, -2, 0.5, 3], [0.5, 1, -1, 2]])
HALF, TWO_FOUR = Prune(sparsity=0.5), Prune(sparsity=0.5, pattern="2:4")


def statistics(gram: Tensor, tokens: int = 8) -> InputStatistics:
    return InputStatistics(tokens, gram.diagonal().clone(), gram)


def solve(solver: SparseGPT, weight: Tensor, gram: Tensor, prune: Prune) -> Solved:
    (solved,) = solver.solve([weight], statistics(gram), [prune], [torch.Generator()])
    return solved


def drawn(seed: int, rows: int, columns: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the gram of correlated inputs of unequal power."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens or 4 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def damped(gram: Tensor, damp: float = 0.01) -> Tensor:
    gram = gram.double()
    return gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def loss(weight: Tensor, solved: Solved, gram: Tensor) -> float:
    change = (weight - solved.weight).double()
    return 0.5 * float(((change @ damped(gram)) * change).sum())


def by_explicit_inverse(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    """The oracle of the update: columns left to right, each with the inverse of the trailing damped gram."""
    new, gram = weight.double().clone(), damped(gram)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(gram[column:, column:])
        removed = torch.where(keep[:, column], 0.0, new[:, column])
        new[:, column:] -= torch.outer(removed, inverse[0] / inverse[0, 0])
        new[~keep[:, column], column] = 0.0
    return new


def official(weight: Tensor, gram: Tensor, sparsity: float, block: int, pruned_of: tuple[int, int] | None) -> Tensor:
    """The official algorithm in float64, with its thresholds. `pruned_of`: (n pruned, of m)."""
    new, columns = weight.double().clone(), weight.shape[1]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        score = (new[:, start:stop] / upper.diagonal()[start:stop]) ** 2
        if pruned_of is None:
            prune = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        else:
            prune = torch.zeros_like(score, dtype=torch.bool)
        errors = torch.zeros_like(score)
        for column in range(start, stop):
            if pruned_of and column % pruned_of[1] == 0:
                n, m = pruned_of
                score = (new[:, column : column + m] / upper.diagonal()[column : column + m]) ** 2
                prune.scatter_(1, column - start + score.topk(n, dim=1, largest=False).indices, True)
            pruned = prune[:, column - start]
            errors[:, column - start] = torch.where(pruned, new[:, column], 0.0) / upper[column, column]
            new[:, column:stop] -= torch.outer(errors[:, column - start], upper[column, column:stop])
            new[pruned, column] = 0.0
        new[:, stop:] -= errors @ upper[start:stop, stop:]
    return new


def test_factor_worked_by_hand():
    factor = factorise(H, 0.01)
    expected = torch.tensor([0.580359, 0.461377, 0.589299, 0.406726])
    torch.testing.assert_close(1 / factor.upper.diagonal(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(factor.upper @ factor.upper.T, damped(H).float())
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(
        torch.linalg.inv(factor.upper).T @ torch.linalg.inv(factor.upper), torch.linalg.inv(damped(H)).float()
    )


def test_reference_worked_by_hand():
    solved = solve(SparseGPT(reference=True), W, H, HALF)
    assert solved.keep.int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 1]]
    expected = torch.tensor([[0, -1.562033, 0, 3.248139], [0, 0, 0, 1.917287]])
    torch.testing.assert_close(solved.weight, expected, atol=2e-6, rtol=0)
    assert loss(W, solved, H) == pytest.approx(6.135904, abs=1e-5)
    only_masked = Solved(W * solved.keep, solved.keep)
    assert loss(W, only_masked, H) == pytest.approx(6.953750, abs=1e-5)


def test_reference_in_blocks_of_two_prunes_one_too_many_in_each():
    solved = solve(SparseGPT(block=2, reference=True), W, H, HALF)
    assert (~solved.keep).sum() == 6
    assert loss(W, solved, H) == pytest.approx(17.246582, abs=1e-4)
    assert (~solve(SparseGPT(block=2), W, H, HALF).keep).sum() == 4


@pytest.mark.parametrize("reference", [True, False])
def test_2_4_worked_by_hand(reference):
    solved = solve(SparseGPT(reference=reference), W, H, TWO_FOUR)
    expected = torch.tensor([[0, -1.562033, 0, 3.248139], [0, 1.218983, 0, 1.917287]])
    torch.testing.assert_close(solved.weight, expected, atol=2e-6, rtol=0)
    assert loss(W, solved, H) == pytest.approx(3.734367, abs=1e-5)


def test_exact_count_worked_by_hand():
    solved = solve(SparseGPT(), W, H, HALF)  # scores / U_jj^2: the reference's fifth, 2.0 at row 1 column 1, stays
    assert (~solved.keep).sum() == 4
    scores = (W / torch.tensor([0.580359, 0.461377, 0.589299, 0.406726])).square().flatten()
    assert sorted(scores.argsort()[:4].tolist()) == (~solved.keep).flatten().nonzero().flatten().tolist()
    torch.testing.assert_close(solved.weight.double(), by_explicit_inverse(W, solved.keep, H), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prune", [HALF, TWO_FOUR, Prune(sparsity=0.8), Prune(sparsity=0.25, pattern="6:8")], ids=str)
@pytest.mark.parametrize("block", [128, 16, 5, 1])
def test_weights_are_those_of_the_explicit_inverse(prune, block):
    weight, gram = drawn(block, 7, 48)
    solved = solve(SparseGPT(block=block), weight, gram, prune)
    expected = by_explicit_inverse(weight, solved.keep, gram)
    torch.testing.assert_close(solved.weight.double(), expected, atol=2e-4, rtol=1e-4)
    assert not solved.weight[~solved.keep].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "5:8"])
@pytest.mark.parametrize("block", [128, 32])
def test_reference_is_the_official_algorithm(pattern, block):
    weight, gram = drawn(3, 24, 160)
    prune = Prune(sparsity=0.375 if pattern == "5:8" else 0.5, pattern=pattern)
    expected = official(
        weight, gram, prune.sparsity, block, (prune.nm[1] - prune.nm[0], prune.nm[1]) if prune.nm else None
    )
    solved = solve(SparseGPT(block=block, reference=True), weight, gram, prune)
    assert torch.equal(solved.keep, expected != 0)
    torch.testing.assert_close(solved.weight.double(), expected, atol=1e-3, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(1, 50), st.booleans())
def test_counts_are_exact_in_the_matrix_and_in_each_block(seed, rows, columns, sparsity, block, ties):
    weight, gram = drawn(seed, rows, columns)
    weight = weight.sign() if ties else weight
    solved = solve(SparseGPT(block=block), weight, gram, Prune(sparsity=sparsity))
    pruned = ~solved.keep
    assert pruned.sum() == round(sparsity * weight.numel())
    for part in pruned.split(block, dim=1):
        assert abs(part.sum() - pruned.sum() * part.numel() / pruned.numel()) < 1 + 1e-4
    assert not solved.weight[pruned].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 5), (1, 1)]), st.integers(1, 40))
def test_nm_keeps_n_of_every_m(seed, nm, block):
    n, m = nm
    weight, gram = drawn(seed, 5, 6 * m)
    keep = solve(SparseGPT(block=block), weight, gram, Prune(sparsity=1 - n / m, pattern=f"{n}:{m}")).keep
    assert (keep.reshape(5, 6, m).sum(-1) == n).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 30), st.sampled_from([1.0, -1.0]))
def test_equal_inputs_give_magnitude_in_each_block_and_no_update(seed, rows, columns, block, sign):
    weight = (drawn(seed, rows, columns)[0] * 2).round() * sign  # many ties
    solved = solve(SparseGPT(block=block), weight, 4 * torch.eye(columns), HALF)
    assert torch.equal(solved.weight, weight * solved.keep)
    for part, keep in zip(weight.split(block, 1), solved.keep.split(block, 1), strict=True):
        exact = Prune(sparsity=int((~keep).sum()) / keep.numel())
        (masked,) = Magnitude().solve([part], None, [exact], [torch.Generator()])
        assert torch.equal(masked.keep, keep)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([HALF, TWO_FOUR]), st.sampled_from([2.0**-12, 2.0**12]))
def test_scale_of_the_gram_changes_nothing_and_scale_of_the_weight_scales(seed, prune, scale):
    weight, gram = drawn(seed, 6, 24)
    gram[5], gram[:, 5] = 0, 0  # a dead input among them
    solved, scaled = solve(SparseGPT(), weight, gram, prune), solve(SparseGPT(), weight, gram * scale, prune)
    assert torch.equal(solved.weight, scaled.weight)
    assert torch.equal(solve(SparseGPT(), weight * scale, gram, prune).weight, solved.weight * scale)


def test_rows_follow_a_permutation():
    weight, gram = drawn(0, 30, 64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    solved, permuted = (solve(SparseGPT(), w, gram, HALF) for w in (weight, weight[order]))
    assert torch.equal(permuted.keep, solved.keep[order])
    torch.testing.assert_close(permuted.weight, solved.weight[order], atol=1e-4, rtol=1e-4)


def test_matrices_solved_together_equal_those_solved_alone():
    _, gram = drawn(0, 1, 48)
    weights = [drawn(seed, rows, 48)[0] for seed, rows in enumerate([12, 4, 4, 1, 6, 6, 3])]
    prunes = [
        HALF,
        Prune(sparsity=0.9),
        TWO_FOUR,
        Prune(sparsity=0.1),
        Prune(sparsity=0.75, pattern="1:4"),
        Prune(sparsity=0.5, pattern="4:8"),
        Prune(sparsity=0),
    ]
    together = SparseGPT(block=32).solve(weights, statistics(gram), prunes, [torch.Generator()] * 7)
    for weight, prune, solved in zip(weights, prunes, together, strict=True):
        alone = solve(SparseGPT(block=32), weight, gram, prune)
        assert torch.equal(solved.keep, alone.keep)
        assert (~solved.keep).sum() == round(prune.sparsity * weight.numel())
        torch.testing.assert_close(solved.weight, alone.weight, atol=1e-4, rtol=1e-4)
        assert solved.error == pytest.approx(alone.error, rel=1e-3)


@pytest.mark.parametrize("tokens", [8, 64, 4000])
@pytest.mark.parametrize("damp", [0.01, 1.0, 1e4])
def test_error_is_the_change_of_the_outputs(tokens, damp):
    weight, gram = drawn(7, 20, 64, tokens)  # with 8 tokens the gram is singular
    solved = solve(SparseGPT(damp=damp), weight, gram, HALF)
    change = (weight - solved.weight).double()
    assert solved.error == pytest.approx(float(((change @ gram.double()) * change).sum()), rel=2e-3)


def test_compensation_beats_the_mask_alone_on_average():
    ratios = []
    for seed in range(40):
        weight, gram = drawn(seed, 8, 32)
        solved = solve(SparseGPT(), weight, gram, HALF)
        kept = (weight * ~solved.keep).double()
        ratios.append(solved.error / float(((kept @ gram.double()) * kept).sum()))
    assert sum(ratios) / len(ratios) < 0.7


@pytest.mark.parametrize("prune", [Prune(sparsity=0), Prune(sparsity=0, pattern="4:4")], ids=str)
def test_nothing_to_prune_leaves_every_bit(prune):
    weight, gram = drawn(0, 4, 12)
    weight[0, 0] = -0.0
    solved = solve(SparseGPT(), weight, gram, prune)
    assert solved.weight.numpy().tobytes() == weight.numpy().tobytes()
    assert solved.keep.all()
    assert solved.error == 0


def test_everything_pruned_costs_the_whole_output():
    weight, gram = drawn(0, 4, 12)
    solved = solve(SparseGPT(), weight, gram, Prune(sparsity=1))
    assert not solved.weight.any()
    assert solved.error == pytest.approx(float(((weight @ gram) * weight).sum()), rel=1e-3)


def test_the_reference_prunes_even_at_sparsity_zero_and_zeroes_dead_inputs():
    weight, gram = drawn(0, 4, 12)
    assert (~solve(SparseGPT(reference=True), weight, gram, Prune(sparsity=0)).keep).sum() == 1
    gram[3], gram[:, 3] = 0, 0
    solved = solve(SparseGPT(reference=True), weight, gram, Prune(sparsity=0))
    assert not solved.weight[:, 3].any()
    assert not solved.keep[:, 3].any()


def test_dead_inputs_go_first_smallest_weights_before_and_disturb_nothing():
    weight, gram = drawn(2, 4, 12)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 4, 9]] = True
    gram[dead], gram[:, dead] = 0, 0
    solved = solve(SparseGPT(), weight, gram, Prune(sparsity=8 / 48))  # 8 of the 12 dead weights
    assert solved.keep[:, ~dead].all()
    assert torch.equal(solved.weight[:, ~dead], weight[:, ~dead])
    ranks = weight[:, dead].abs().flatten()
    assert torch.equal(~solved.keep[:, dead].flatten(), ranks <= ranks.sort().values[7])
    assert torch.equal(solved.weight[solved.keep], weight[solved.keep])
    assert solved.error == 0
    # all dead weights gone and half of the rest: the rest as if the dead inputs were not there
    both = solve(SparseGPT(), weight, gram, Prune(sparsity=30 / 48))
    alone = solve(SparseGPT(), weight[:, ~dead], gram[~dead][:, ~dead], HALF)
    torch.testing.assert_close(both.weight[:, ~dead], alone.weight, atol=1e-5, rtol=1e-5)


def test_fewer_tokens_than_columns_is_fine():
    weight, gram = drawn(1, 10, 64, tokens=5)
    solved = solve(SparseGPT(), weight, gram, HALF)
    assert solved.notes == ()
    assert solved.error < 0.5 * float(((weight * ~solved.keep) @ gram * (weight * ~solved.keep)).sum())


def test_no_tokens_means_magnitude_and_says_so():
    weight, _ = drawn(1, 6, 8)
    unseen = InputStatistics(0, torch.zeros(8))
    (solved,) = SparseGPT().solve([weight], unseen, [HALF], [torch.Generator()])
    assert solved.notes == ("no calibration token reached it: pruned by magnitude",)
    (expected,) = Magnitude().solve([weight], None, [HALF], [torch.Generator()])
    assert torch.equal(solved.weight, expected.weight)


def test_damping_is_raised_until_the_factorisation_succeeds_and_told():
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 1.3  # smallest eigenvalue -0.3: needs damping above 0.3
    weight = drawn(0, 3, 4)[0]
    solved = solve(SparseGPT(), weight, indefinite, HALF)
    assert solved.notes == ("damping raised from 0.01 to 1 of the mean input power: the factorisation had failed",)
    singular = torch.ones(4, 4)
    assert solve(SparseGPT(damp=0), weight, singular, HALF).notes[0].startswith("damping raised from 0 to 0.01")


def test_float64_saves_what_float32_cannot_factor():
    low, middle, failures = 1, 1, 0
    for step in range(2, 24):
        low, middle, high = middle, low + middle, low + 2 * middle  # Fibonacci: low * high - middle^2 = 1 at odd steps
        if step % 2 == 0:
            continue
        gram = torch.tensor([[float(high), middle], [middle, low]])
        failures += int(torch.linalg.cholesky_ex(gram.flip(0, 1)).info)
        assert low * high - middle**2 == 1
        factor = factorise(gram, 0.0)
        assert factor.notes == ()
        torch.testing.assert_close(factor.upper @ factor.upper.T, gram)
    assert failures


def test_hopeless_moments_are_refused():
    with pytest.raises(SolveError, match="could not be factorised even with damping 1000"):
        solve(SparseGPT(), W, torch.eye(4) - 2000 * (1 - torch.eye(4)), HALF)
    gram = H.clone()
    gram[0, 1] = torch.inf
    with pytest.raises(SolveError, match="1 non-finite value"):
        solve(SparseGPT(), W, gram, HALF)


def test_bad_requests_are_refused():
    with pytest.raises(ShapeError, match=r"block\(2x3\): a weight of 2x4 does not split"):
        solve(SparseGPT(), W, H, Prune(sparsity=0.5, pattern="block(2x3)"))
    with pytest.raises(ShapeError, match="3 inputs do not split into groups of 4"):
        solve(SparseGPT(), W[:, :3], H[:3, :3], TWO_FOUR)
    with pytest.raises(ConfigError, match="needs calibration data"):
        SparseGPT().solve([W], None, [HALF], [torch.Generator()])
    with pytest.raises(ConfigError, match="needs the gram"):
        SparseGPT().solve([W], InputStatistics(3, torch.ones(4)), [HALF], [torch.Generator()])
    with pytest.raises(SolveError, match="weight has 1 non-finite value "):
        solve(SparseGPT(), W / torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]), H, HALF)
    with pytest.raises(ConfigError, match=r"SparseGPT\.damp=-1"):
        SparseGPT(damp=-1)
    with pytest.raises(ConfigError, match=r"SparseGPT\.block=0"):
        SparseGPT(block=0)


BLOCKS = ["block(2x4)", "block(1x3)", "block(6x2)", "row", "column"]


@pytest.mark.parametrize("pattern", BLOCKS)
def test_one_group_gone_is_the_one_of_least_loss_and_made_up_for_exactly(pattern):
    """Against brute force: each group alone removed, by explicit inverses."""
    weight, gram = drawn(3, 6, 12, tokens=64)
    height, width = Prune(sparsity=0.0, pattern=pattern).block or {"row": (1, 12), "column": (6, 1)}[pattern]
    costs = {}
    for top in range(0, 6, height):
        for left in range(0, 12, width):
            keep = torch.ones(6, 12, dtype=torch.bool)
            keep[top : top + height, left : left + width] = False
            change = weight.double() - by_explicit_inverse(weight, keep, gram)
            costs[top, left] = float(((change @ damped(gram)) * change).sum())
    least = min(costs, key=costs.__getitem__)
    solved = solve(SparseGPT(), weight, gram, Prune(sparsity=1 / len(costs), pattern=pattern))
    gone = (~solved.keep).nonzero()
    assert (gone.amin(0).tolist(), len(gone)) == (list(least), height * width)
    change = weight.double() - solved.weight
    assert float(((change @ damped(gram)) * change).sum()) == pytest.approx(costs[least], rel=1e-3)


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 1.0])
def test_blocks_are_whole_and_their_count_exact(pattern, sparsity):
    weight, gram = drawn(5, 6, 12)
    prune = Prune(sparsity=sparsity, pattern=pattern)
    solved = solve(SparseGPT(), weight, gram, prune)
    assert int((~solved.keep).sum()) == prune.zeros(72, 6, 12)
    assert not solved.weight[~solved.keep].any()
    height, width = prune.block or {"row": (1, 12), "column": (6, 1)}[pattern]
    grid = solved.keep.reshape(6 // height, height, 12 // width, width).sum((1, 3))
    assert ((grid == 0) | (grid == height * width)).all()


def test_blocks_that_the_plan_names_go_and_the_rest_makes_up_for_them():
    weight, gram = drawn(7, 4, 8, tokens=64)
    prune = Prune(
        sparsity=0.5, pattern="block(2x4)", kept="6"
    )  # 0110: the second of the first row, the first of the second
    solved = solve(SparseGPT(damp=0.0), weight, gram, prune)
    keep = torch.ones(4, 8, dtype=torch.bool)
    keep[:2, :4] = keep[2:, 4:] = False
    assert torch.equal(solved.keep, keep)
    masked = weight * keep
    assert loss(weight, solved, gram) < float((((weight - masked) @ gram) * (weight - masked)).sum())


def test_2_4_on_few_tokens_worked_by_hand():
    """Five tokens, the Hessian 2/5 X^T X with 1 % damping: 1 % of the gram's own mean here."""
    inputs = torch.tensor([[1, 0.5, 0, 0.2], [0, 1, 0.3, -0.4], [0.2, -0.1, 1, 0.6], [0.5, 0.3, -0.2, 1], [1, 1, 0, 0]])
    weight = torch.tensor([[1, 2, 2, 0.5], [2, -1, 1, 4.0]])
    gram = inputs.T @ inputs
    solved = solve(SparseGPT(), weight, gram, TWO_FOUR)
    wanted = torch.tensor([[0, 2.710930, 1.861131, 0], [2, 0, 0, 4.215418]])
    torch.testing.assert_close(solved.weight, wanted, atol=1e-5, rtol=0)
    change = weight - solved.weight
    assert float(((change @ gram) * change).sum()) == pytest.approx(5.599477, abs=1e-4)
    inverse = torch.linalg.inv(damped(2 / 5 * gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scores = weight.double().square() / upper.diagonal().square()
    first = [[0.278005, 3.752621, 1.757843, 0.157833], [1.112019, 0.938155, 0.439461, 10.101280]]
    torch.testing.assert_close(scores, torch.tensor(first, dtype=torch.float64), atol=1e-5, rtol=0)
