import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farms_oracle import POOLED, alpha_at, peak_alpha
from layerwise.errors import ConfigError, ScoreError
from layerwise.scores import tail_fit
from layerwise.scores.tail_fit import FITS, fit_tail, hill


def pareto(exponent, count, seed=0):
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - draws).pow(-1 / (exponent - 1)).sort().values


def test_hill_worked_by_hand():
    values = torch.tensor([1.0, 2, 3, 4, 5, 6, 8, 16])
    found = fit_tail(values, "mid")
    assert found.alpha == pytest.approx(3.203279, abs=1e-6)
    assert (found.cut, found.tail, found.count) == (5.0, 4, 8)
    # the paper's k = 4 ratios to the fifth largest: the cut's own ln 1 = 0 is not counted
    assert 1 + 4 / (values[4:] / values[3]).log().sum() == pytest.approx(2.477077, abs=1e-6)


def test_fits_worked_by_hand():
    pooled = torch.tensor(POOLED, dtype=torch.float64)
    assert fit_tail(pooled, "mid").alpha == pytest.approx(2.054517, abs=1e-5)
    assert fit_tail(torch.tensor([3.220688, 5.720318, 19.353983, 63.705011]), "mid").alpha == pytest.approx(
        2.678747, abs=1e-5
    )
    assert tail_fit._peak(pooled) == pytest.approx(6.543274, abs=1e-4)
    reference, fixed = fit_tail(pooled, "peak-reference"), fit_tail(pooled, "peak")
    assert (reference.alpha, reference.cut) == (pytest.approx(1.847538, abs=1e-5), POOLED[4])
    assert reference.distance == pytest.approx(0.267549, abs=1e-5)
    assert (fixed.alpha, fixed.cut) == (pytest.approx(2.165156, abs=1e-5), POOLED[5])


def test_the_candidates_of_the_reference_depend_on_the_unit_and_those_of_the_fix_do_not():
    pooled = torch.tensor(POOLED, dtype=torch.float64)

    def candidates(scale, fit):
        values = scale**2 * pooled
        return len(tail_fit._candidates(values, hill(values), fit))

    assert [candidates(scale, "peak-reference") for scale in (1, 0.1)] == [4, 7]
    assert [candidates(scale, "peak") for scale in (1, 0.1, 30)] == [2, 2, 2]


def test_hill_finds_the_exponent_of_a_power_law():
    assert fit_tail(pareto(2.5, 20_000), "mid").alpha == pytest.approx(2.5, abs=0.05)
    assert fit_tail(pareto(2.5, 20_000), "full").alpha == pytest.approx(2.5, abs=0.05)


def test_every_window_twice_is_the_same_tail():
    values = pareto(3.0, 500)
    assert fit_tail(values.repeat_interleave(2), "mid").alpha == pytest.approx(fit_tail(values, "mid").alpha)


@given(st.integers(0, 10_000), st.sampled_from([12, 50, 301]))
@settings(max_examples=40, deadline=None)
def test_all_cuts_at_once_equal_one_at_a_time(seed, count):
    values = pareto(2.2, count, seed)
    alphas = hill(values)
    for i in range(0, count - 1, max(1, count // 7)):
        assert float(alphas[i]) == pytest.approx(alpha_at(values, i), rel=1e-9)
    for reference in (False, True):
        alpha, cuts = peak_alpha(values, reference=reference)
        name = "peak-reference" if reference else "peak"
        assert fit_tail(values, name).alpha == pytest.approx(alpha, rel=1e-9)
        assert len(tail_fit._candidates(values, alphas, name)) == cuts


def test_many_cuts_are_searched_coarsely_then_closely(monkeypatch):
    """With so few points looked at in the first round, the second must put it right."""
    values = torch.cat([torch.linspace(0.01, 1, 400, dtype=torch.float64), pareto(2.5, 600)])  # the tail begins at 1
    exact = fit_tail(values, "full")
    assert exact.cut == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(tail_fit, "MOST", 60)
    monkeypatch.setattr(tail_fit, "POINTS", 200)
    quick = fit_tail(values, "full")
    assert quick.distance == pytest.approx(exact.distance, rel=0.05)
    assert quick.alpha == pytest.approx(exact.alpha, rel=0.02)


def test_zeros_are_no_part_of_a_spectrum():
    values = pareto(2.5, 100)
    with_zeros = torch.cat(
        [torch.zeros(30, dtype=torch.float64), torch.full((5,), 1e-12 * float(values[-1])).double(), values]
    )
    for fit in FITS:
        if fit != "peak-reference":
            assert fit_tail(with_zeros, fit) == fit_tail(values, fit)
    assert fit_tail(with_zeros, "peak-reference").count == 105  # exact zeros alone


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "values", [[], [0.0] * 9, [0.0, 0, 0, 2], [3.0] * 9, [1.0, float("nan"), 2], [1.0, float("inf")]]
)
def test_no_alpha_is_made_up(fit, values):
    with pytest.raises(ScoreError):
        fit_tail(torch.tensor(values), fit)


def test_an_unknown_fit_is_refused():
    with pytest.raises(ConfigError, match="give one of mid, peak"):
        fit_tail(torch.ones(9), "median")
