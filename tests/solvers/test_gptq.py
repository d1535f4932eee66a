"""GPTQ against worked numbers, the explicit inverse, round to nearest and SparseGPT."""

import pytest
import torch
from torch import Tensor

from layerwise.errors import ConfigError, ShapeError, SolveError
from layerwise.passes.statistics import InputStatistics
from layerwise.plan import Prune, Quantize, Treatments
from layerwise.solvers import GPTQ, RoundToNearest, Solved, SparseGPT
from layerwise.solvers.column_grids import ColumnGrids
from layerwise.solvers.factor import factorise
from layerwise.solvers.grids import Grid, fit, steps_of
from layerwise.solvers.sweep import sweep

torch.set_num_threads(1)
X = torch.tensor([[1, 0.9, 0.2], [0.5, 0.6, -0.4], [0.2, 0.1, 1], [0.8, 0.7, 0.3]])
H, W = 2 * X.T @ X / 4, torch.tensor([[0.7, 0.2, -0.3]])
FOUR = Quantize(bits=4, group=16)
HALF, TWO_FOUR = Prune(sparsity=0.5), Prune(sparsity=0.5, pattern="2:4")


def statistics(gram: Tensor, tokens: int = 8) -> InputStatistics:
    return InputStatistics(tokens, gram.diagonal().clone(), gram)


def solve(solver, weight: Tensor, gram: Tensor, way) -> Solved:
    (solved,) = solver.solve([weight], statistics(gram), [way], [torch.Generator()])
    return solved


def drawn(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the gram of correlated inputs of unequal power."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs


def damped(gram: Tensor) -> Tensor:
    gram = gram.double()
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def by_explicit_inverse(weight: Tensor, gram: Tensor, grid: Grid, size: int, keep: Tensor | None = None) -> Tensor:
    """The oracle: columns left to right in float64, each with the inverse of the trailing damped gram; groups fitted as they begin."""
    new, gram = weight.double().clone(), damped(gram)
    for column in range(weight.shape[1]):
        if column % size == 0:
            some = new[:, column : column + size].float()
            # of the mask of a whole row nothing is known yet
            known = keep is not None and size < weight.shape[1]
            scale, zero = fit(some * keep[:, column : column + size] if known else some, grid)
        steps = steps_of(new[:, column : column + 1].float(), scale, zero, grid)
        code = ((steps - zero.unsqueeze(1)) * scale.unsqueeze(1)).squeeze(1).double()
        if keep is not None:
            code *= keep[:, column]
        inverse = torch.linalg.inv(gram[column:, column:])
        new[:, column:] -= torch.outer(new[:, column] - code, inverse[0] / inverse[0, 0])
        new[:, column] = code
    return new.float()


def test_worked_by_hand():
    """Step 0.5 for all. After column 0 the row is 0.5, 0.406999, -0.272250; after column 1 the last is -0.290048."""
    factor = factorise(H, 0.01)
    assert float(factor.added[0]) == pytest.approx(0.00815, abs=1e-6)
    grids = ColumnGrids([W], [Quantize(bits=4, group=None, symmetric=True)], [Grid(4, symmetric=True)])
    grids.scale.fill_(0.5)
    (swept,) = sweep([W], factor, [Prune(sparsity=0)], 128, grids=grids)
    assert swept.weight.tolist() == [[0.5, 0.5, -0.5]]
    assert torch.equal(grids.codes()[0].weight(), swept.weight)
    assert swept.damped_error / 2 == pytest.approx(0.01836775, abs=1e-7)

    def quadratic(values):
        change = (W - torch.tensor([values])).double()
        return 0.5 * float(((change @ damped(H)) * change).sum())

    assert quadratic([0.5, 0.5, -0.5]) == pytest.approx(0.01836775, abs=1e-7)
    assert quadratic([0.5, 0.0, -0.5]) == pytest.approx(0.098789, abs=1e-6)  # round to nearest
    grid = torch.cartesian_prod(*[torch.arange(-2, 5) * 0.5] * 3)
    best = min(grid.tolist(), key=quadratic)
    assert best == [1.0, 0.0, -0.5]
    assert quadratic(best) == pytest.approx(0.01211775, abs=1e-7)
    row, found = W.double().clone(), []
    for column in range(3):
        inverse = torch.linalg.inv(damped(H)[column:, column:])
        lost = row[:, column] - torch.round(row[:, column] / 0.5) * 0.5
        row[:, column:] -= torch.outer(lost, inverse[0] / inverse[0, 0])
        found.append(row.tolist()[0])
    assert found[0] == pytest.approx([0.5, 0.406999, -0.272250], abs=1e-6)
    assert found[1] == pytest.approx([0.5, 0.5, -0.290048], abs=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 24, None])
@pytest.mark.parametrize(
    "solver", [GPTQ(act_order=False), GPTQ(act_order=False, mse=True, block=40), GPTQ(act_order=True)], ids=str
)
def test_of_unrelated_inputs_it_is_round_to_nearest(solver, bits, symmetric, group):
    weight, _ = drawn(bits, 7, 48)
    gram = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.1)
    way = Quantize(bits=bits, group=group, symmetric=symmetric)
    solved, nearest = solve(solver, weight, gram, way), solve(RoundToNearest(mse=solver.mse), weight, gram, way)
    assert torch.equal(solved.weight, nearest.weight)
    for name in ("values", "scale", "zero"):
        assert torch.equal(getattr(solved.codes, name), getattr(nearest.codes, name))


@pytest.mark.parametrize("group", [16, 24, 5, 1, 48, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [128, 7])
def test_codes_are_those_of_the_explicit_inverse_with_groups_as_they_are(block, symmetric, group):
    weight, gram = drawn(group or 0, 7, 240)
    solved = solve(GPTQ(act_order=False, block=block), weight, gram, Quantize(bits=3, group=group, symmetric=symmetric))
    expected = by_explicit_inverse(weight, gram, Grid(3, symmetric), group or 240)
    # a weight that lies between two codes may go either way, and what follows with it
    assert (solved.weight - expected).abs().gt(1e-6).any(1).sum() <= 1
    assert torch.equal(solved.weight, solved.codes.weight())


def test_the_size_of_blocks_changes_nothing():
    weight, gram = drawn(3, 24, 192)
    one, *others = (
        solve(GPTQ(act_order=False, block=block), weight, gram, FOUR).codes for block in (128, 1, 16, 48, 500)
    )
    for other in others:
        assert (one.values != other.values).any(1).sum() <= 1
        torch.testing.assert_close(one.scale, other.scale, rtol=1e-2, atol=0)


@pytest.mark.parametrize("mse", [False, True])
def test_act_order_is_the_sweep_in_another_order_with_groups_of_consecutive_inputs(mse):
    weight, gram = drawn(4, 6, 64)
    way, order = Quantize(bits=3, group=16), gram.diagonal().argsort(descending=True, stable=True)
    solved = solve(GPTQ(act_order=True, mse=mse), weight, gram, way)
    fixed = solve(RoundToNearest(mse=mse), weight, gram, way).codes  # groups on the original weights
    assert torch.equal(solved.codes.scale, fixed.scale)
    assert torch.equal(solved.codes.zero, fixed.zero)
    new, trailing = weight.double()[:, order], damped(gram)[order][:, order]
    for place, column in enumerate(order.tolist()):
        scale, zero = fixed.scale[:, column // 16], fixed.zero[:, column // 16]
        steps = steps_of(new[:, place : place + 1].float(), scale, zero, Grid(3))
        code = ((steps.squeeze(1) - zero) * scale).double()
        inverse = torch.linalg.inv(trailing[place:, place:])
        new[:, place:] -= torch.outer(new[:, place] - code, inverse[0] / inverse[0, 0])
        new[:, place] = code
    assert (solved.weight[:, order] - new.float()).abs().gt(1e-6).any(1).sum() <= 1
    assert torch.equal(solved.weight, solved.codes.weight())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer_than_those_of_round_to_nearest_and_the_error_is_theirs(bits):
    weight, gram = drawn(5, 30, 96)
    way = Quantize(bits=bits, group=32)
    solved, nearest = solve(GPTQ(act_order=False), weight, gram, way), solve(RoundToNearest(), weight, gram, way)
    assert solved.error < 0.8 * nearest.error
    change = (weight - solved.weight).double()
    assert solved.error == pytest.approx(float(((change @ gram.double()) * change).sum()), rel=1e-2)


@pytest.mark.parametrize("prune", [HALF, Prune(sparsity=0.7), TWO_FOUR, Prune(sparsity=0.25, pattern="6:8")], ids=str)
@pytest.mark.parametrize("group", [16, 12, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_codes_in_one_sweep(symmetric, group, prune):
    weight, gram = drawn(6, 9, 96)
    way = Treatments(prune=prune, quantize=Quantize(bits=4, group=group, symmetric=symmetric))
    solved = solve(GPTQ(act_order=False, block=48), weight, gram, way)
    assert (~solved.keep).sum() == round(prune.sparsity * weight.numel())
    assert not solved.weight[~solved.keep].any()
    assert torch.equal(solved.weight, solved.codes.weight())
    if prune.nm:
        n, m = prune.nm
        assert (solved.keep.reshape(9, -1, m).sum(-1) == n).all()
    keep = None if prune.nm else solved.keep  # of n:m the mask comes after the group
    if keep is not None:
        expected = by_explicit_inverse(weight, gram, Grid(4, symmetric), group or 96, keep)
        assert (solved.weight - expected).abs().gt(1e-6).any(1).sum() <= 1
    apart = solve(SparseGPT(block=48), weight, gram, prune)
    nearest = solve(RoundToNearest(), apart.weight, gram, way.quantize)
    change = (weight - nearest.weight).double()
    if prune.sparsity <= 0.5:  # beyond, what pruning costs hides what rounding does
        assert solved.error < float(((change @ gram.double()) * change).sum())


@pytest.mark.parametrize("prune", [HALF, TWO_FOUR, Prune(sparsity=0.7)], ids=str)
@pytest.mark.parametrize("quantize", [None, FOUR], ids=str)
def test_what_is_pruned_is_swept_as_it_comes(prune, quantize):
    """Sorted, the strongest inputs would share a block, of which as large a part goes as of the weakest."""
    weight, gram = drawn(11, 24, 256)
    way = Treatments(prune=prune, quantize=quantize)
    sorted_first, as_it_comes = (solve(GPTQ(act_order=order), weight, gram, way) for order in (True, False))
    assert torch.equal(sorted_first.weight, as_it_comes.weight)
    assert sorted_first.error == as_it_comes.error


@pytest.mark.parametrize("prune", [HALF, TWO_FOUR, Prune(sparsity=0)], ids=str)
def test_what_is_only_pruned_is_sparsegpts_to_the_bit(prune):
    weight, gram = drawn(7, 9, 96)
    solved, other = solve(GPTQ(act_order=False), weight, gram, prune), solve(SparseGPT(), weight, gram, prune)
    assert torch.equal(solved.weight, other.weight)
    assert solved.codes is None
    assert solved.error == other.error


@pytest.mark.parametrize("solver", [GPTQ(act_order=False, block=32), GPTQ(act_order=True)], ids=str)
def test_matrices_solved_together_equal_those_solved_alone(solver):
    _, gram = drawn(8, 1, 96)
    ways = [
        FOUR,
        Quantize(bits=2, group=16, symmetric=True),
        Quantize(bits=8, group=None),
        Treatments(prune=HALF, quantize=FOUR),
        Treatments(prune=TWO_FOUR, quantize=Quantize(bits=3, group=16)),
        Prune(sparsity=0.3),
        Quantize(bits=3, group=96),
    ]
    weights = [drawn(seed, rows, 96)[0] for seed, rows in enumerate([12, 4, 4, 1, 6, 6, 3])]
    together = solver.solve(weights, statistics(gram), ways, [torch.Generator()] * 7)
    for weight, way, solved in zip(weights, ways, together, strict=True):
        alone = solve(solver, weight, gram, way)
        assert torch.equal(solved.keep, alone.keep)
        assert (solved.weight - alone.weight).abs().gt(1e-6).any(1).sum() <= 1
        assert solved.notes == alone.notes
        if solved.codes is not None:
            assert torch.equal(solved.weight, solved.codes.weight())
            assert solved.codes.bits == (way if isinstance(way, Quantize) else way.quantize).bits
    assert not any(solved.notes for solved in together)


def test_dead_inputs_are_rounded_to_the_nearest_and_change_nothing_else():
    weight, gram = drawn(9, 8, 64)
    dead = [3, 17, 40]
    gram[dead], gram[:, dead] = 0.0, 0.0
    way = Quantize(bits=4, group=None, symmetric=True)
    solved = solve(GPTQ(act_order=False), weight, gram, way)
    assert torch.equal(solved.weight[:, dead], solve(RoundToNearest(), weight, gram, way).weight[:, dead])
    live = [column for column in range(64) if column not in dead]
    fixed = weight.clone()
    fixed[:, dead] = 0.0
    assert solved.error == pytest.approx(solve(GPTQ(act_order=False), fixed, gram, way).error, rel=0.2)
    assert not torch.equal(solved.weight[:, live], weight[:, live])


@pytest.mark.parametrize(
    ("way", "done"),
    [
        (FOUR, "rounded to the nearest"),
        (HALF, "pruned by magnitude"),
        (Treatments(prune=HALF, quantize=FOUR), "pruned by magnitude, then rounded to the nearest"),
    ],
)
def test_without_tokens_weights_are_treated_by_themselves_with_a_note(way, done):
    weight, _ = drawn(10, 6, 32)
    unseen = InputStatistics(0, torch.zeros(32), torch.zeros(32, 32))
    (solved,) = GPTQ(act_order=False).solve([weight], unseen, [way], [torch.Generator()])
    assert solved.notes == (f"no calibration token reached it: {done}",)
    if isinstance(way, Quantize):
        (nearest,) = RoundToNearest().solve([weight], None, [way], [torch.Generator()])
        assert torch.equal(solved.weight, nearest.weight)
    else:
        assert (~solved.keep).sum() == 96
        assert not solved.weight[~solved.keep].any()
        assert (solved.codes is None) == isinstance(way, Prune)


@pytest.mark.parametrize("order", [False, True])
def test_a_failed_factorisation_raises_the_damping_once_then_weights_are_treated_by_themselves(order):
    weight, _ = drawn(10, 6, 4)
    ways = [Quantize(bits=4, group=4), HALF, Treatments(prune=HALF, quantize=Quantize(bits=4, group=4))]

    def solved(off):
        gram = torch.eye(4)
        gram[0, 1] = gram[1, 0] = off
        return GPTQ(act_order=order).solve([weight] * 3, statistics(gram), ways, [torch.Generator()] * 3)

    mended, *_ = solved(1.05)  # the least eigenvalue is -0.05: above 0.1 once that is added
    assert mended.notes == ("damping raised from 0.01 to 0.1 of the mean input power: the factorisation had failed",)
    hopeless = solved(1.3)
    why = "its inputs' second moments could not be factorised, with ten times the damping neither (more calibration tokens help)"
    done = ("rounded to the nearest", "pruned by magnitude", "pruned by magnitude, then rounded to the nearest")
    assert [one.notes for one in hopeless] == [(f"{why}: {words}",) for words in done]
    (nearest,) = RoundToNearest().solve([weight], None, [ways[0]], [torch.Generator()])
    assert torch.equal(hopeless[0].weight, nearest.weight)
    gram = torch.eye(4)
    gram[0, 1] = torch.inf
    with pytest.raises(SolveError, match="1 non-finite value"):
        solve(GPTQ(act_order=order), weight, gram, ways[0])


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="GPTQ needs calibration data"):
        GPTQ(act_order=False).solve([W], None, [FOUR], [torch.Generator()])
    with pytest.raises(ConfigError, match='collect statistics with needs="gram"'):
        GPTQ(act_order=False).solve(
            [W], InputStatistics(3, torch.ones(3)), [Quantize(bits=4, group=None)], [torch.Generator()]
        )
    with pytest.raises(ShapeError, match="3 inputs do not split into groups of 2"):
        solve(GPTQ(act_order=False), W, H, Quantize(bits=4, group=2))
    with pytest.raises(ConfigError, match=r'not in the pattern "row"'):
        solve(GPTQ(act_order=False), W, H, Prune(sparsity=0.5, pattern="row"))
    for bad in ({"damp": -1.0}, {"block": 0}, {"scales": "int8"}):
        with pytest.raises(ConfigError, match="GPTQ"):
            GPTQ(act_order=False, **bad)
