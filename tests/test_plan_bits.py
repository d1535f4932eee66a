"""Bits of a plan: what the layers take, true and nominal, and whether that is within the budget."""

import pytest

from layerwise.errors import BudgetError, PlanError
from layerwise.plan import Budget, Change, GroupBits, Plan, Prune, Quantize, Treatments, diff_plans
from layerwise.plan_bits import allowed
from test_plan import LAYERS, Sized


def mixed(**budget):
    """Layers of 100 and 300 weights, rows of 10, in groups of 5: 8 and 2 bits."""
    layers = {one.name: Quantize(bits=8 if one.name.endswith("q") else 2, group=5) for one in LAYERS}
    return Plan(budget=Budget(**budget), layers=layers)


@pytest.mark.parametrize(
    ("quantize", "more", "bits"),
    [
        (
            {"bits": 4, "group": 128},
            {"group_bits": GroupBits(16, shift=True)},
            4.25,
        ),  # scale and shift, 16 bits each, for 128 weights
        ({"bits": 4, "group": 128}, {"group_bits": GroupBits(32, shift=True)}, 4.5),
        ({"bits": 4, "group": 128}, {"group_bits": GroupBits(32)}, 4 + 36 / 128),
        ({"bits": 4, "group": 128, "symmetric": True}, {"group_bits": GroupBits(32, shift=True)}, 4.25),
        ({"bits": 4, "group": 128}, {}, 4 + 20 / 128),
        ({"bits": 4, "group": 128, "symmetric": True}, {}, 4.125),
        ({"bits": 8, "group": None, "symmetric": True}, {}, 8 + 16 / 256),
        ({"bits": 3, "group": 64}, {"nominal": True}, 3),
        ({"bits": 2, "group": 100}, {}, 2 + 3 * 18 / 256),  # the last group of a row is short, its scale is not
    ],
)
def test_true_bits_of_a_weight(quantize, more, bits):
    assert Quantize(**quantize).stored_bits(1024, 256, **more) == 1024 * bits


def test_what_a_plan_achieves_is_counted_over_the_layers_it_quantises():
    plan = mixed(bits=8.0).with_achieved([*LAYERS, Sized("head", 50, 10)])
    # per weight 8 + 24 / 5 of 200, 2 + 18 / 5 of 600
    assert plan.budget.achieved_bits == (200 * 12.8 + 600 * 5.6) / 800
    assert plan.budget.nominal_bits == (200 * 8 + 600 * 2) / 800
    assert plan.budget.achieved is None
    assert Plan.from_text(plan.to_yaml()) == plan
    bare = plan.model_copy(update={"layers": {}}).with_achieved(LAYERS)
    assert (bare.budget.achieved, bare.budget.achieved_bits, bare.budget.nominal_bits) == (0.0, None, None)
    assert mixed(shift=True).achieved_bits(LAYERS) == (200 * (8 + 32 / 5) + 600 * (2 + 32 / 5)) / 800


def test_sparse_and_quantised_layers_achieve_both():
    both = Treatments(prune=Prune(sparsity=0.5), quantize=Quantize(bits=4, group=None))
    plan = Plan(layers={LAYERS[0].name: both}).with_achieved(LAYERS)
    assert (plan.budget.achieved, plan.budget.achieved_bits, plan.budget.nominal_bits) == (0.5, 6.0, 4.0)


def test_a_plan_that_takes_more_than_its_budget_is_refused():
    mixed(bits=7.4).check(LAYERS)  # 5920 bits to the last
    mixed(bits=8.0).check(LAYERS)
    mixed(bits=3.5, nominal=True).check(LAYERS)
    with pytest.raises(PlanError) as caught:
        mixed(bits=7.399).check(LAYERS)
    assert str(caught.value) == (
        "plan: budget.bits 7.399 is 5919 bits for 800 weights, the layers take 5920 (7.400000). Lower the bits of some, or set"
        " budget.bits to 7.4."
    )
    with pytest.raises(PlanError, match=r"budget\.bits 3\.4 is 2720 bits"):
        mixed(bits=3.4, nominal=True).check(LAYERS)


def test_what_a_solver_stores_of_groups_is_what_the_budget_counts():
    plan = mixed(bits=7.4)
    assert plan.stored_with(GroupBits()) == plan
    wide = plan.stored_with(GroupBits(32, shift=True)).with_achieved(LAYERS)
    assert wide.budget.achieved_bits == (200 * (8 + 64 / 5) + 600 * (2 + 64 / 5)) / 800
    assert (wide.budget.shift, wide.budget.scale_bits) == (True, 32)
    assert Plan.from_text(wide.to_yaml()) == wide
    assert wide.stored_with(GroupBits()).with_achieved(LAYERS) == plan.with_achieved(LAYERS)
    with pytest.raises(PlanError) as caught:
        wide.check(LAYERS)
    assert str(caught.value) == (
        "plan: budget.bits 7.4 is 5920 bits for 800 weights, the layers take 13040 (16.300000) with the solver's scales and zeros of"
        " 32 bits. Lower the bits of some, plan for this solver, or set budget.bits to 16.3."
    )
    with pytest.raises(PlanError, match=r"with the solver's scales of 32 bits\. Lower"):
        plan.stored_with(GroupBits(32)).check(LAYERS)


def test_a_quotient_is_met_by_what_it_came_from():
    for weights in (3, 7, 999_999_937, 7 * 10**9):
        for bits in (weights * 3 + 1, weights * 2 + weights // 3):
            assert allowed(bits / weights, weights) == bits
    assert allowed(0.3, 10) == 3


def test_changed_bits_are_seen():
    plan = mixed(bits=8.0)
    other = plan.model_copy(
        update={"layers": {**plan.layers, "blocks.0.q": Treatments(quantize=Quantize(bits=4, group=5))}}
    )
    assert diff_plans(plan, other) == [Change("blocks.0.q", "quantize.bits", 8, 4)]


def test_there_is_no_sparsity_to_rebalance():
    with pytest.raises(BudgetError, match=r"no budget\.sparsity to meet\. budget\.bits are met by changing levels"):
        mixed(bits=8.0).rebalance(LAYERS)
