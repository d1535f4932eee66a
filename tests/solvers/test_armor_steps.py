"""ARMOR's steps in float64: worked numbers, closed forms, and that none ever raises the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.solvers.armor_draws import apply, draw, remask
from layerwise.solvers.armor_exact import fit_core, fit_left, fit_right
from layerwise.solvers.armor_gains import gains
from layerwise.solvers.armor_masks import masks_of, subsets_of
from layerwise.solvers.armor_state import (
    State,
    Target,
    block_sums,
    core_curvature,
    core_gradient,
    loss,
    residual,
    start,
    times_left,
    times_right,
)
from layerwise.solvers.select import keep_nm

torch.set_num_threads(1)
WIDE = torch.float64


def problem(seed, high, wide, block, n=2, m=4, shaken=True):
    """A target of high x wide blocks, and a state on the way: NoWag-P's with A and B away from the identity."""
    stream = torch.Generator().manual_seed(seed)
    weight = torch.randn(high * block, wide * block, generator=stream, dtype=WIDE)
    power = torch.exp(torch.randn(wide * block, generator=stream, dtype=WIDE))
    target = Target(weight, power, block, n, m)
    state = start(target, keep_nm(weight.square() * power, n, m))
    if shaken:
        for one in (state.left, state.right):
            one += 0.1 * torch.randn(one.shape, generator=stream, dtype=WIDE)
    return target, state


def at(target, state):
    return core_gradient(target, state, residual(target, state)), core_curvature(target, state)


def not_above(target, after, before):
    """Up to rounding, also where a fit is exact and only rounding is left."""
    assert float(after) <= float(before) * (1 + 1e-10) + 1e-20 * float(target.total)


def worked():
    """The specification's 2 x 4 example; A is 2 x 2 there, so that two rows of nothing make the block square."""
    weight = torch.zeros(4, 4, dtype=WIDE)
    weight[:2] = torch.tensor(
        [[0.331918, 0.663836, 0.663836, 0.092057], [0.605142, -0.302571, 0.302571, 0.671345]], dtype=WIDE
    )
    target = Target(weight, torch.tensor([1, 4, 0.25, 1], dtype=WIDE), 4, 2, 4)
    state = start(target, keep_nm(weight.square() * target.power, 2, 4))
    state.left[0, 0, 1], state.left[0, 1, 0] = 0.2, -0.1
    for row, column, value in ((0, 1, 0.1), (1, 2, 0.2), (2, 3, -0.1), (3, 0, 0.3)):
        state.right[0, row, column] = value
    return target, state


def test_the_discrete_step_worked_by_hand():
    target, state = worked()
    assert state.keep[:2].tolist() == [[True, True, False, False], [True, False, False, True]]
    assert float(loss(target, state)) == pytest.approx(0.504046, abs=1e-5)
    gradient, curvature = at(target, state)
    assert (2 * gradient.abs().sum(1))[:2].tolist() == pytest.approx([0.808744, 3.370115], abs=1e-5)
    masks = masks_of(curvature[1], 2, 4)
    gain = gains(state, gradient, curvature[0], masks)
    assert float(gain[0, 0, 0]) == pytest.approx(0.504046 - 0.454927, abs=1e-5)
    apply(state, gradient, curvature[0], masks, torch.zeros(1, 1, 1, dtype=torch.long))
    assert state.keep[0].tolist() == [False, True, True, False]
    assert state.core[0].tolist() == pytest.approx([0, 0.681264, 0.488241, 0], abs=1e-5)
    assert float(loss(target, state)) == pytest.approx(0.454927, abs=1e-5)


@pytest.mark.parametrize(
    ("kept", "values", "least"),
    [((0, 1), (0.186393, 0.668759), 0.482282), ((1, 3), None, 0.517170), ((0, 2), None, 2.123450)],
)
def test_the_other_masks_worked_by_hand(kept, values, least):
    target, state = worked()
    gradient, (left, right) = at(target, state)
    masks = masks_of(right, 2, 4)
    zeroed = gradient[0] - left[0, 0, 0] * right[0] @ state.core[0]
    chosen = next(t for t, one in enumerate(masks.subsets) if one.nonzero().flatten().tolist() == list(kept))
    state.core[0] = -masks.inverse[0, 0, chosen] @ zeroed / left[0, 0, 0]
    assert float(loss(target, state)) == pytest.approx(least, abs=1e-5)
    if values is not None:
        assert state.core[0, list(kept)].tolist() == pytest.approx(values, abs=1e-5)


patterns = st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (4, 4), (1, 1)])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16]))


@given(seed=st.integers(0, 10**6), shape=shapes, pattern=patterns)
@settings(max_examples=40, deadline=None)
def test_no_step_raises_the_loss_and_every_group_keeps_n(seed, shape, pattern):
    target, state = problem(seed, *shape, *pattern)
    before = loss(target, state)
    stream = torch.Generator().manual_seed(seed)
    for select in ("gain", "gradient", "uniform"):
        gradient, curvature = at(target, state)
        gradient = fit_core(state, gradient, curvature, 1 + seed % 3)
        torch.testing.assert_close(gradient, at(target, state)[0], atol=1e-9, rtol=1e-7)
        middle = loss(target, state)
        not_above(target, middle, before)
        remask(target, state, gradient, curvature, 3, select, stream)
        later = loss(target, state)
        not_above(target, later, middle)
        fit_left(target, state)
        last = loss(target, state)
        not_above(target, last, later)
        fit_right(target, state)
        before = loss(target, state)
        not_above(target, before, last)
        assert (state.keep.view(-1, pattern[1]).sum(1) == pattern[0]).all()
        assert not state.core[~state.keep].any()


@given(seed=st.integers(0, 10**6), pattern=patterns)
@settings(max_examples=25, deadline=None)
def test_new_values_are_those_of_least_squares_and_leave_no_gradient(seed, pattern):
    target, state = problem(seed, 1, 1, 16, *pattern)
    m = pattern[1]
    gradient, curvature = at(target, state)
    group = seed % (16 * 16 // m)
    row, first = group // (16 // m), group % (16 // m) * m
    masks = masks_of(curvature[1], *pattern)
    before = loss(target, state)
    gain = gains(state, gradient, curvature[0], masks)[0, 0, group]
    apply(state, gradient, curvature[0], masks, torch.tensor([[[group]]]))
    assert float(before - loss(target, state)) == pytest.approx(float(gain), rel=1e-6, abs=1e-9)
    # by brute force: every mask, by least squares on the vectorised residual
    core = state.core.clone()
    core[row, first : first + m] = 0
    root = target.power.sqrt()
    rest = (residual(target, State(state.left, core, state.right, state.keep)) * root).flatten()
    each = [(state.left[0, :, row, None] * (state.right[0, first + k] * root)).flatten() for k in range(m)]
    found = {}
    for t, subset in enumerate(subsets_of(*pattern)):
        columns = torch.stack([each[k] for k in subset.nonzero().flatten().tolist()], 1)
        values = torch.linalg.lstsq(columns, rest.unsqueeze(1)).solution
        found[t] = (float((rest - (columns @ values).squeeze(1)).square().sum()), values.flatten())
    best = min(found, key=lambda t: found[t][0])
    now = state.core[row, first : first + m]
    assert float(loss(target, state)) == pytest.approx(found[best][0], rel=1e-9)
    chosen = subsets_of(*pattern)[best]
    torch.testing.assert_close(now[chosen], found[best][1], atol=1e-6, rtol=1e-6)
    slope = at(target, state)[0][row, first : first + m]
    assert float(slope[chosen].abs().max()) <= 1e-8 * float(gradient.abs().max())


@given(seed=st.integers(0, 10**6), shape=shapes)
@settings(max_examples=25, deadline=None)
def test_blocks_are_problems_of_their_own(seed, shape):
    """The loss is the sum of block losses; all blocks at once, and each alone with the same draws, come to the same core."""
    high, wide, block = shape
    target, state = problem(seed, *shape)
    parts = block_sums(residual(target, state).square() * target.power, block)
    assert float(parts.sum()) == pytest.approx(float(loss(target, state)), rel=1e-12)
    gradient, curvature = at(target, state)
    groups = draw(gradient, target, 5, "gradient", torch.Generator().manual_seed(seed))
    together = state.copy()
    apply(together, gradient, curvature[0], masks_of(curvature[1], 2, 4), groups)
    for i in range(high):
        for j in range(wide):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            alone = Target(target.weight[rows, columns].clone(), target.power[columns], block, 2, 4)
            own = State(
                state.left[i : i + 1],
                state.core[rows, columns].clone(),
                state.right[j : j + 1],
                state.keep[rows, columns].clone(),
            )
            assert float(loss(alone, own)) == pytest.approx(float(parts[i, j]), rel=1e-12)
            slope, (left, right) = at(alone, own)
            torch.testing.assert_close(slope, gradient[rows, columns])
            for one in groups[i, j].tolist():  # one after the other, the gradient computed anew each time
                slope, (left, right) = at(alone, own)
                apply(own, slope, left, masks_of(right, 2, 4), torch.tensor([[[one]]]))
            torch.testing.assert_close(own.core, together.core[rows, columns], atol=1e-9, rtol=1e-7)
            assert torch.equal(own.keep, together.keep[rows, columns])


def test_exact_steps_are_the_least_squares_that_they_say():
    target, state = problem(5, 2, 3, 8)
    fit_left(target, state)
    root = target.power.sqrt()
    rows = times_right(state.core, state.right) * root
    for i in range(2):
        part = slice(i * 8, i * 8 + 8)
        wanted = torch.linalg.lstsq(rows[part].T, (target.weight[part] * root).T).solution.T
        torch.testing.assert_close(state.left[i], wanted, atol=1e-4, rtol=1e-4)
    fit_right(target, state)
    columns = times_left(state.left, state.core)
    for j in range(3):
        part = slice(j * 8, j * 8 + 8)
        wanted = torch.linalg.lstsq(columns[:, part], target.weight[:, part]).solution
        torch.testing.assert_close(state.right[j], wanted, atol=1e-4, rtol=1e-4)


def test_enough_conjugate_gradients_are_the_optimum_of_the_core():
    target, state = problem(6, 2, 2, 8)
    gradient, curvature = at(target, state)
    gradient = fit_core(state, gradient, curvature, 80)
    assert float(gradient[state.keep].abs().max()) < 1e-9


def test_draws_follow_the_gradient_and_are_even_where_there_is_none():
    target, _ = problem(0, 1, 1, 8)
    gradient = torch.zeros(8, 8, dtype=WIDE)
    gradient[3, 4] = 3.0  # group 7
    gradient[0, 0] = 1.0  # group 0
    stream = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(gradient, target, 1, "gradient", stream).flatten() for _ in range(400)])
    assert set(drawn.tolist()) == {0, 7}
    assert 0.65 < float((drawn == 7).float().mean()) < 0.85
    for empty in (torch.zeros(8, 8, dtype=WIDE), torch.full((8, 8), torch.nan, dtype=WIDE)):
        drawn = torch.cat([draw(empty, target, 4, "gradient", stream).flatten() for _ in range(100)])
        assert set(drawn.tolist()) == set(range(16))


def test_an_all_zero_block_and_dead_factors_stay_finite():
    target, state = problem(1, 2, 2, 8, shaken=False)
    target.weight[:8, :8] = 0
    state = start(target, keep_nm(target.weight.square() * target.power, 2, 4))
    state.left[1] = 0  # nothing that its rows of the core do is seen
    before = loss(target, state)
    for _ in range(3):
        gradient, curvature = at(target, state)
        remask(target, state, fit_core(state, gradient, curvature, 2), curvature, 4, "gain", torch.Generator())
        fit_left(target, state)
        fit_right(target, state)
    assert state.weight().isfinite().all()
    not_above(target, loss(target, state), before)
