"""NoWag: numbers worked by hand, the identity with Wanda, invariances, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import ConfigError, ShapeError, SolveError
from layerwise.passes.statistics import InputStatistics
from layerwise.plan import Prune
from layerwise.solvers import Magnitude, NoWag
from layerwise.solvers.nowag import EPSILON, FLOOR, normalise, power_of
from layerwise.solvers.select import keep_nm

torch.set_num_threads(1)
W = torch.tensor([[1, 2, 2, 0.5], [2, -1, 1, 4]], dtype=torch.float64)
H = torch.tensor([1, 4, 0.25, 1], dtype=torch.float64)
TWO_OF_FOUR = Prune(sparsity=0.5, pattern="2:4")


def solve(weight, squares, prune=TWO_OF_FOUR, tokens=10, **more):
    (solved,) = NoWag(**more).solve([weight], InputStatistics(tokens, squares), [prune], [torch.Generator()])
    return solved


def drawn(seed, rows, columns, dtype=torch.float64):
    stream = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=stream, dtype=dtype)
    return weight, torch.exp(torch.randn(columns, generator=stream, dtype=dtype))


def test_normalisation_worked_by_hand():
    found = normalise(W)
    assert found.columns.tolist() == pytest.approx([2.236068] * 3 + [4.031129], abs=1e-6)
    assert found.rows.tolist() == pytest.approx([1.347362, 1.478044], abs=1e-6)
    wanted = [[0.331918, 0.663836, 0.663836, 0.092057], [0.605142, -0.302571, 0.302571, 0.671345]]
    torch.testing.assert_close(found.weight, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.rows[:, None] * found.weight * found.columns, W, atol=1e-12, rtol=0)


def test_masks_and_losses_worked_by_hand():
    solved = solve(W.float(), H.float())
    assert solved.keep.tolist() == [[True, True, False, False], [True, False, False, True]]
    assert torch.equal(solved.weight, W.float() * solved.keep)
    by_magnitude = Magnitude().solve([W.float()], None, [TWO_OF_FOUR], [torch.Generator()])[0].keep
    assert by_magnitude[0].tolist() == [False, True, True, False]
    scaled = normalise(W).weight
    total, lost = ((scaled.square() * keep * H).sum() for keep in (torch.ones(2, 4), ~solved.keep))
    assert float(total) == pytest.approx(3.197511, abs=1e-6)
    assert float(lost) == pytest.approx(0.507729, abs=1e-6)
    assert float(lost / total) == pytest.approx(0.158789, abs=1e-6)


def test_the_official_constants():
    found = normalise(W, EPSILON)
    assert float(found.columns[0]) == pytest.approx(5**0.5 + 1e-5, rel=1e-12)
    power, _ = power_of(InputStatistics(5, torch.tensor([0.0, 3, 1, 0])), reference=True)
    assert power.tolist() == pytest.approx([2, 3, 1, 2])


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    nm=st.sampled_from([(2, 4), (1, 4), (4, 8)]),
)
@settings(max_examples=40, deadline=None)
def test_within_a_row_the_mask_is_wandas_by_column_norm(seed, rows, groups, nm):
    n, m = nm
    weight, power = drawn(seed, rows, groups * m)
    columns = torch.linalg.vector_norm(weight, dim=0)
    wanted = keep_nm(weight.square() * power / columns.square(), n, m)
    found = solve(weight, power, Prune(sparsity=1 - n / m, pattern=f"{n}:{m}"))
    assert torch.equal(found.keep, wanted)
    assert (found.keep.view(rows, groups, m).sum(-1) == n).all()


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 3.0, 1e5]), sparsity=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_no_scale_changes_a_mask_and_counts_are_exact(seed, scale, sparsity):
    weight, power = drawn(seed, 6, 16)
    prune = Prune(sparsity=sparsity)
    keep = solve(weight, power, prune).keep
    assert int((~keep).sum()) == round(sparsity * weight.numel())
    for other, squares in ((weight * scale, power), (weight, power * scale)):
        assert torch.equal(solve(other, squares, prune).keep, keep)


@pytest.mark.parametrize("pattern", ["row", "column", "block(2x2)", "unstructured", "2:4"])
def test_every_pattern_leaves_kept_weights_as_they_were(pattern):
    weight, power = drawn(0, 6, 16, torch.float32)
    solved = solve(weight, power, Prune(sparsity=0.5, pattern=pattern))
    assert int((~solved.keep).sum()) == 48
    assert torch.equal(solved.weight[solved.keep], weight[solved.keep])
    assert not solved.weight[~solved.keep].any()


def test_unstructured_weights_compete_over_the_matrix_or_in_each_row():
    weight, power = drawn(3, 6, 16, torch.float32)
    per_row = solve(weight, power, Prune(sparsity=0.5), compare="row").keep.sum(1)
    assert (per_row == 8).all()
    scores = normalise(weight).weight.square() * power
    keep = solve(weight, power, Prune(sparsity=0.5)).keep
    assert float(scores[keep].min()) >= float(scores[~keep].max())


def test_dead_inputs_get_a_small_floor_and_no_weight():
    weight, power = drawn(1, 4, 8, torch.float32)
    power[2] = 0
    found, note = power_of(InputStatistics(5, power))
    assert note is None
    assert float(found[2]) == pytest.approx(FLOOR)
    assert not solve(weight, power).keep[:, 2].any()


def test_zero_columns_rows_and_weights_are_no_trouble():
    weight, power = drawn(2, 4, 8, torch.float32)
    weight[:, 1], weight[2] = 0, 0
    solved = solve(weight, power)
    assert solved.weight.isfinite().all()
    assert (solved.keep.view(-1, 4).sum(1) == 2).all()
    assert not solve(torch.zeros(4, 8), power).weight.any()


def test_inputs_that_say_nothing_are_said_to():
    weight, _ = drawn(2, 4, 8, torch.float32)
    for inputs, why in (
        (InputStatistics(0, torch.zeros(8)), "no calibration token reached it"),
        (InputStatistics(9, torch.zeros(8)), "its inputs are zero on all calibration tokens"),
    ):
        (solved,) = NoWag().solve([weight], inputs, [TWO_OF_FOUR], [torch.Generator()])
        assert solved.notes == (f"{why}: all inputs count alike",)
        assert torch.equal(solved.keep, keep_nm(normalise(weight).weight.square(), 2, 4))


def test_bad_input_is_one_line():
    weight, power = drawn(2, 4, 8, torch.float32)
    with pytest.raises(ConfigError, match="NoWag needs calibration data"):
        NoWag().solve([weight], None, [TWO_OF_FOUR], [torch.Generator()])
    with pytest.raises(ConfigError, match=r'NoWag\.compare="rows"'):
        NoWag(compare="rows")
    with pytest.raises(SolveError, match="2 of 8 inputs are not finite"):
        solve(weight, torch.tensor([1.0, float("inf"), 1, 1, float("nan"), 1, 1, 1]))
    with pytest.raises(SolveError, match="weight has 1 non-finite value"):
        solve(torch.where(weight == weight.max(), torch.nan, weight), power)
    with pytest.raises(ShapeError, match="do not split into groups of 4"):
        solve(weight[:, :6], power[:6])
