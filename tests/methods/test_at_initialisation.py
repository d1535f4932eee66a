"""Methods that rank single weights before training: SNIP, GraSP, SynFlow, and the ratios of the first two."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.errors import BudgetError, DataError, ModelError, ScoreError
from layerwise.methods import OWL, SNIP, GraSP, GraSPRatio, SNIPRatio, SynFlow, Uniform
from layerwise.methods.ranked import keep_highest
from layerwise.scores import snip_scores, synflow_scores
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, CifarResNet, inputs_for

SNIP_SCORES = {"W1": torch.tensor([[4.0, 8], [4, 16]]), "W2": torch.tensor([[4.0, 20]])}
GRASP_SCORES = {"W1": torch.tensor([[113.0, -226], [149, 596]]), "W2": torch.tensor([[-49.0, 965]])}  # high = keep


def resnet(width=4, blocks=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarResNet(width, blocks)
    return model, structure_of(model, include=["*"])


def images(count=2, labels=True):
    made = []
    for seed in range(count):
        one = inputs_for("cifar_resnet", None, batch=8, seed=seed)
        made.append({**one, "labels": torch.arange(8)} if labels else one)
    return Batches(tuple(made), {})


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_snip_keeps_three_of_six_worked_by_hand():
    got = keep_highest(SNIP_SCORES, 0.5)
    assert got["W1"].tolist() == [[False, True], [False, True]]
    assert got["W2"].tolist() == [[False, True]]


def test_ties_do_not_overshoot():
    """Four of six: three weights tie at 4 for the last place, and the official ">=" would keep all of them."""
    got = keep_highest(SNIP_SCORES, 1 / 3)
    assert got["W1"].tolist() == [[True, True], [False, True]]  # the lower index
    assert kept(got) == {"W1": 3, "W2": 1}
    threshold = torch.cat([score.flatten() for score in SNIP_SCORES.values()]).sort(descending=True).values[3]
    assert sum(int((score >= threshold).sum()) for score in SNIP_SCORES.values()) == 6


def test_grasp_loses_the_top_three_of_its_own_sign_worked_by_hand():
    got = keep_highest(GRASP_SCORES, 0.5)
    assert kept(got) == {"W1": 2, "W2": 1}
    assert got["W1"].tolist() == [[False, False], [True, True]]
    paper = torch.cat([-score.flatten() for score in GRASP_SCORES.values()])
    assert int((paper <= paper.sort(descending=True).values[2]).sum()) == 4  # the official "<=" takes one too few


def test_bounds_take_the_lowest_and_leave_the_highest_of_a_layer():
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([5.0, 6, 7, 8])}
    assert kept(keep_highest(scores, 0.5)) == {"a": 0, "b": 4}
    got = keep_highest(scores, 0.5, low=0.25, high=0.75)
    assert got["a"].tolist() == [False, False, False, True]
    assert got["b"].tolist() == [False, True, True, True]
    with pytest.raises(BudgetError, match=r"Raise max_sparsity to 0\.5"):
        keep_highest(scores, 0.5, high=0.4)


def test_scores_that_are_all_equal_are_refused():
    for value in (0.0, 3.0):
        with pytest.raises(ScoreError, match=f"SNIP's score is {value:g} for every weight, .* or the method uniform"):
            keep_highest({"a": torch.full((3,), value), "b": torch.full((2, 2), value)}, 0.5, owner="SNIP's score")
    assert kept(keep_highest({"a": torch.zeros(3)}, 0.0)) == {"a": 3}  # nothing to rank
    model, structure = resnet()
    nn.init.zeros_(model.fc.weight)  # no gradient comes through it, and it is zero itself
    nn.init.zeros_(model.fc.bias)
    uniform = Uniform(sparsity=0.9).plan(model, structure=structure)
    body = structure_of(model, include=["*"], exclude=["fc"])
    for method, layers in (
        (SNIP(), structure),
        (SNIPRatio(redraw=False), structure),
        (GraSP(), body),
        (SynFlow(), structure),
    ):
        plan = method.plan(model, images(), structure=layers)
        assert plan.notes == (
            f"{type(method).__name__.removesuffix('Ratio')}'s score is 0 for every weight, so it ranks none above another: uniform",
        )
        assert plan.budget.achieved == pytest.approx(0.9, abs=1e-3)
        assert layers is body or plan.layers == uniform.layers
        if not isinstance(method, SNIPRatio):
            with pytest.raises(ScoreError, match="Use other data, or the method uniform"):
                method.keep(model, images(), structure=layers)


some_scores = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=5)


@settings(deadline=None)
@given(some_scores, st.floats(0, 0.99))
def test_exactly_the_budget_and_nothing_that_goes_is_above_what_stays(values, sparsity):
    scores = {str(index): torch.tensor(one, dtype=torch.float32) for index, one in enumerate(values)}
    pooled = torch.cat(list(scores.values()))
    pruned = round(sparsity * len(pooled))
    if 0 < pruned < len(pooled) and pooled.min() == pooled.max():
        with pytest.raises(ScoreError):
            keep_highest(scores, sparsity)
        return
    masks = torch.cat(list(keep_highest(scores, sparsity).values()))
    assert int(masks.sum()) == len(pooled) - pruned
    expected = pooled.sort(descending=True, stable=True).indices[: len(pooled) - pruned]  # ties keep the lower index
    assert masks.nonzero().flatten().tolist() == sorted(expected.tolist())


@settings(deadline=None)
@given(some_scores, st.floats(0.2, 0.8), st.sampled_from([0.0, 0.1, 0.2]), st.sampled_from([0.8, 0.9, 1.0]))
def test_bounds_hold_up_to_a_weight(values, sparsity, low, high):
    scores = {str(i): torch.tensor(one, dtype=torch.float32) + 0.1 * i for i, one in enumerate(values)}
    total = sum(len(one) for one in values)
    scores["0"][0] = 9.0  # never all equal
    masks = keep_highest(scores, sparsity, low, high)
    zeros = {name: len(mask) - int(mask.sum()) for name, mask in masks.items()}
    assert sum(zeros.values()) == round(sparsity * total)
    sizes = {name: len(mask) for name, mask in masks.items()}
    most = {name: math.floor(Fraction(repr(high)) * size) for name, size in sizes.items()}
    least = {name: min(most[name], math.ceil(Fraction(repr(low)) * size)) for name, size in sizes.items()}
    if sum(least.values()) <= round(sparsity * total) <= sum(most.values()):  # else whole weights leave no way
        assert all(least[name] <= zeros[name] <= most[name] for name in zeros)


@pytest.mark.parametrize("made", [SNIP, SNIPRatio, GraSP, GraSPRatio, SynFlow])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.01])
def test_densities_are_fractions_and_meet_the_budget(made, density):
    model, structure = resnet()
    settings = {"rounds": 4} if made is SynFlow else {}
    plan = made(sparsity=1 - density, **settings).plan(model, images(), structure=structure)
    densities = {name: 1 - entry.prune.sparsity for name, entry in plan.layers.items()}
    assert all(0 <= value <= 1 for value in densities.values())
    sizes = {layer.name: layer.size for layer in structure}
    budget = density * sum(sizes.values())
    assert abs(sum(densities[name] * sizes[name] for name in sizes) - budget) < 1
    assert sum(plan.zeros(structure.layers).values()) == round((1 - density) * sum(sizes.values()))
    assert plan.scores.keys() == sizes.keys()


@pytest.mark.parametrize("method", [SNIP(), GraSP(), SynFlow(rounds=5)], ids=lambda method: method.name)
def test_a_method_with_a_mask_of_its_own_plans_what_the_mask_counts(method):
    model, structure = resnet()
    plan, keep = (make(model, images(), structure=structure) for make in (method.plan, method.keep))
    zeros = {name: int((~mask).sum()) for name, mask in keep.items()}
    assert zeros == plan.zeros(structure.layers)
    for layer in structure:
        assert keep[layer.name].shape == layer.shape
        assert keep[layer.name].dtype == torch.bool


def test_snips_mask_is_the_highest_of_all_scores():
    model, structure = resnet()
    keep, scores = SNIP().keep(model, images(), structure=structure), snip_scores(model, images(), structure)
    stays = torch.cat([scores[name][mask] for name, mask in keep.items()])
    goes = torch.cat([scores[name][~mask] for name, mask in keep.items()])
    assert stays.min() >= goes.max()


def test_snip_ratio_knows_the_seed_and_not_the_weights():
    model, structure = resnet()
    plans = [SNIPRatio(seed=seed).plan(model, images(), structure=structure).layers for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert (
        SNIPRatio(redraw=False).plan(model, images(), structure=structure).layers
        == SNIP().plan(model, images(), structure=structure).layers
    )
    with torch.no_grad():
        for layer in structure:
            model.get_parameter(layer.parameter).mul_(2)
    assert SNIPRatio().plan(model, images(), structure=structure).layers == plans[0]


def test_grasp_ratio_and_grasp_agree_on_the_sparsities():
    model, structure = resnet()
    assert (
        GraSPRatio().plan(model, images(), structure=structure).layers
        == GraSP().plan(model, images(), structure=structure).layers
    )


def test_synflow_empties_no_layer_where_one_round_does():
    """Its reason to be: where ranking once cuts the network in two, ranking in rounds keeps it connected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [3, 8, 64, 64, 8]
        layers = [part for pair in pairwise(widths) for part in (nn.Conv2d(*pair, 3, bias=False), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10, bias=False))
    structure = structure_of(model, include=["*"])
    once, often = (
        kept(SynFlow(sparsity=0.99, rounds=rounds).keep(model, images(1), structure=structure)) for rounds in (1, 50)
    )
    assert min(once.values()) == 0
    assert min(often.values()) > 0


def test_emptied_layers_are_in_the_notes():
    """Queries and keys of a language model carry no flow of an input of ones; a cap keeps some of them."""
    model = MODELS["llama"]()
    data = Batches((inputs_for("llama", model),), {})
    plan = SynFlow(sparsity=0.5, rounds=5).plan(model, data)
    emptied = [name for name, entry in plan.layers.items() if entry.prune.sparsity == 1]
    assert emptied
    assert all(name.endswith(("q_proj", "k_proj")) for name in emptied)
    assert plan.notes == (
        f"{len(emptied)} of 14 layers lose every weight: {', '.join(emptied[:3])}{' and 1 more' * (len(emptied) == 4)}."
        " A max_sparsity below 1 keeps some",
    )
    capped = SynFlow(sparsity=0.5, rounds=5, max_sparsity=0.9).plan(model, data)
    assert not capped.notes
    assert max(entry.prune.sparsity for entry in capped.layers.values()) <= 0.9


def test_what_went_in_one_round_of_synflow_never_comes_back():
    model, structure = resnet()
    method = SynFlow(sparsity=0.95, rounds=3)
    keep = None
    for number in (1, 2, 3):
        scores = synflow_scores(model, images(1), structure, keep=keep)
        if keep is not None:
            assert all(not scores[name][~mask].any() for name, mask in keep.items())
        sparsity = 0.95 if number == 3 else 1 - 0.05 ** (number / 3)
        keep = keep_highest(
            scores if keep is None else {n: s.masked_fill(~keep[n], -1) for n, s in scores.items()}, sparsity
        )
    got = method.keep(model, images(1), structure=structure)
    assert all(torch.equal(got[name], mask) for name, mask in keep.items())


def test_bad_input():
    model, structure = resnet()
    for method in (SNIP(), SNIPRatio(), GraSP(), GraSPRatio()):
        with pytest.raises(DataError, match="needs labels"):
            method.plan(model, images(labels=False), structure=structure)
    assert SynFlow(rounds=1).plan(model, images(labels=False), structure=structure).budget.achieved  # needs none
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 144, 10))
    with pytest.raises(ModelError, match="has none with layers up for compression"):  # block granularity without blocks
        OWL().plan(flat, images(), structure=structure_of(flat, include=["*"]))
    assert len(SNIP().plan(flat, images(), structure=structure_of(flat, include=["*"])).layers) == 3
