"""Round to nearest and HQQ: worked numbers, both against plain loops, and what holds for all weights."""

import pytest
import torch

from layerwise.errors import ConfigError, ShapeError, SolveError
from layerwise.passes.statistics import InputStatistics
from layerwise.plan import Prune, Quantize, Treatments
from layerwise.solvers import GPTQ, HQQ, RoundToNearest, Wanda, group_bits_of

torch.set_num_threads(1)
W = torch.tensor([[-1.0, -0.2, 0.35, 1.4, 0.1, -0.6, 0.55, 0.9]])


def solve(solver, weight, quantize, inputs=None):
    (solved,) = solver.solve([weight], inputs, [quantize], [torch.Generator()])
    return solved


def drawn(seed, rows=12, columns=64, spread=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def by_hand(weight, quantize, group):
    """Integer grid in plain Python, a weight at a time."""
    new = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            some = weight[row, start : start + group]
            top = 2**quantize.bits - 1
            if quantize.symmetric:
                scale = (some.abs().max() / (top / 2)).half().float()
                zero = torch.tensor(2.0 ** (quantize.bits - 1))
            else:
                low, high = some.min().clamp_max(0), some.max().clamp_min(0)
                scale = ((high - low) / top).half().float()
                zero = torch.round(-low / scale).clamp(0, top)
            for index, one in enumerate(some):
                code = torch.clamp(torch.round(one / scale) + zero, 0, top)
                new[row, start + index] = (code - zero) * scale
    return new


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, None])
def test_round_to_nearest_is_that_of_a_plain_loop(bits, symmetric, group):
    weight, quantize = drawn(bits), Quantize(bits=bits, group=group, symmetric=symmetric)
    solved = solve(RoundToNearest(), weight, quantize)
    assert torch.equal(solved.weight, by_hand(weight, quantize, group or 64))
    assert torch.equal(solved.codes.weight(), solved.weight)
    assert solved.keep.all()
    assert solved.codes.scale.shape == (12, 64 // (group or 64))
    assert solved.codes.bits_per_weight == bits + (16 + (0 if symmetric else bits)) / (group or 64)


@pytest.mark.parametrize("scales", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", [RoundToNearest, HQQ, GPTQ, lambda **more: RoundToNearest(grid="shift", **more)])
def test_a_solver_tells_what_it_stores_of_each_group(kind, scales):
    solver, weight, gram = kind(scales=scales), drawn(5), torch.eye(64)
    for symmetric in (False,) if isinstance(solver, HQQ) else (False, True):
        for bits, group in ((3, 16), (8, None)):
            quantize = Quantize(bits=bits, group=group, symmetric=symmetric)
            codes = solve(solver, weight, quantize, InputStatistics(9, gram.diagonal(), gram)).codes
            told = quantize.stored_bits(weight.numel(), 64, group_bits=group_bits_of(solver))
            assert told == codes.bits_per_weight * weight.numel()
    assert group_bits_of(Wanda()) == (16, False)


def test_int8_per_row_worked_by_hand():
    solver = RoundToNearest(grid="shift", scales="float32")
    solved = solve(solver, W[:, :4], Quantize(bits=8, group=None, symmetric=True))
    assert (solved.codes.values.int() - 128).tolist() == [[-91, -18, 32, 127]]
    assert float(solved.codes.scale) == pytest.approx(0.011023622, rel=1e-6)
    assert not solved.codes.shift


def test_the_search_is_better_at_two_bits_and_off_by_default():
    weight, quantize = drawn(1), Quantize(bits=2, group=None)
    plain, searched = (solve(RoundToNearest(mse=mse), weight, quantize).weight for mse in (False, True))
    searched_error, error = (float((one - weight).abs().pow(2.4).sum()) for one in (searched, plain))
    assert searched_error < 0.8 * error
    assert torch.equal(solve(RoundToNearest(), weight, quantize).weight, plain)


def test_hqq_worked_by_hand():
    """Scale 1 / 1.25; the update moves the zero to 1.196671 with a larger error, so the best is the start."""
    quantize = Quantize(bits=2, group=None)
    solved = solve(HQQ(scales="float32"), W, quantize)
    assert float(solved.codes.scale) == pytest.approx(0.8)
    assert float(solved.codes.zero) == pytest.approx(1.25)
    assert float((solved.weight - W).abs().mean()) == pytest.approx(0.1625, abs=1e-6)
    assert solved.codes.shift
    past = HQQ(scales="float32")
    zero, a = 1.25, 1.25  # the official loop on this row: on as long as the error falls, and no way back
    last, errors = float("inf"), []
    for _ in range(20):
        codes = torch.round(W * a + zero).clamp(0, 3)
        error = W - (codes - zero) / a
        zero = float((codes - (W - past._shrunk(error)) * a).mean())
        errors.append(float(error.abs().mean()))
        if errors[-1] >= last:
            break
        last = errors[-1]
    codes = torch.round(W * a + zero).clamp(0, 3)
    assert zero == pytest.approx(1.196671, abs=1e-5)
    assert float((W - (codes - zero) / a).abs().mean()) == pytest.approx(0.173166, abs=1e-5)


def test_hqq_in_the_units_of_most_models_does_not_see_beta():
    weight, quantize = drawn(2), Quantize(bits=3, group=32)
    one, other = (solve(HQQ(beta=beta), weight, quantize) for beta in (10.0, 1e-6))
    assert torch.equal(one.weight, other.weight)
    large = weight * 50
    assert not torch.equal(*(solve(HQQ(beta=beta), large, quantize).weight for beta in (10.0, 1e-6)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_is_nowhere_worse_than_its_start_and_groups_do_not_see_each_other(bits):
    weight, quantize = drawn(3, rows=40), Quantize(bits=bits, group=16)
    solved, start = solve(HQQ(), weight, quantize), solve(HQQ(rounds=0), weight, quantize)
    off, before = ((one.weight - weight).reshape(-1, 16).abs().mean(1) for one in (solved, start))
    assert (off <= before * (1 + 1e-5) + 1e-9).all()
    assert off.mean() < before.mean()
    assert torch.equal(solve(HQQ(), weight[7:8], quantize).weight, solved.weight[7:8])


@pytest.mark.parametrize("solver", [RoundToNearest(), RoundToNearest(mse=True), RoundToNearest(grid="shift"), HQQ()])
def test_matrices_of_different_bits_together_equal_those_alone(solver):
    weights = [drawn(seed) for seed in range(3)]
    ways = [Quantize(bits=2, group=32), Treatments(quantize=Quantize(bits=4, group=16)), Quantize(bits=8, group=None)]
    together = solver.solve(weights, None, ways, [torch.Generator()] * 3)
    for weight, way, solved in zip(weights, ways, together):
        assert torch.equal(solved.weight, solve(solver, weight, way).weight)
        assert torch.equal(solved.weight, solved.codes.weight())


def test_the_error_is_that_of_the_outputs_where_the_gram_is_known():
    weight, rows = drawn(4), torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    gram = rows.T @ rows
    solved = solve(RoundToNearest(), weight, Quantize(bits=3, group=32), InputStatistics(200, gram.diagonal(), gram))
    assert solved.error == pytest.approx(float(((solved.weight - weight) @ rows.T).square().sum()), rel=1e-4)
    assert solve(RoundToNearest(), weight, Quantize(bits=3, group=32)).error is None


@pytest.mark.parametrize("solver", [RoundToNearest(), HQQ()], ids=lambda solver: solver.name)
def test_bad_requests_are_one_clear_line(solver):
    with pytest.raises(ConfigError, match=rf'solver "{solver.name}" cannot prune, only quantize\.'):
        solve(solver, W, Treatments(prune=Prune(sparsity=0.5), quantize=Quantize(bits=4, group=None)))
    for bits in (1, 9):
        with pytest.raises(ConfigError, match=f"{bits} bits: solvers quantize to 2 to 8"):
            solve(solver, W, Quantize(bits=bits, group=None))
    with pytest.raises(ShapeError, match="8 inputs do not split into groups of 3"):
        solve(solver, W, Quantize(bits=4, group=3))
    with pytest.raises(SolveError, match="1 non-finite value"):
        solve(solver, torch.tensor([[1.0, torch.nan]]), Quantize(bits=4, group=None))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="a symmetric grid fixes"):
        solve(HQQ(), W, Quantize(bits=4, group=None, symmetric=True))
    for bad in ({"p": 2.0}, {"beta": 0.0}, {"rounds": -1}, {"scales": "int8"}):
        with pytest.raises(ConfigError, match="HQQ"):
            HQQ(**bad)
    with pytest.raises(ConfigError, match=r"RoundToNearest\.grid"):
        RoundToNearest(grid="float")
