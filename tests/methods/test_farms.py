"""FARMS and AlphaPruning: the map from alphas to sparsities by worked numbers, and what happens to layers that have no alpha."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import linear_factors
from layerwise.errors import BudgetError, ConfigError, ModelError, ScoreError
from layerwise.methods import FARMS, AlphaPruning
from layerwise.methods.heavy_tails import group_alphas, group_sparsities
from layerwise.plan import Plan
from layerwise.scores import Look, Windows, alpha_hill
from layerwise.structure import structure_of
from models import MODELS

# block alphas of LLaMA-7B, windows of 2000, 15 along each side
LLAMA_7B = [
    2.5762, 3.0134, 2.9599, 3.1878, 3.4356, 3.2277, 3.1295, 3.0654, 2.9932, 2.9516, 2.9792, 2.9507, 2.9520, 3.0936, 3.1427, 3.3080,
    3.5476, 3.5058, 3.7419, 3.8659, 4.1734, 3.9544, 4.1173, 4.0753, 4.3478, 4.4393, 4.2080, 4.5100, 4.2218, 4.0667, 4.1137, 3.7552,
]  # fmt: skip


def shared(alphas, sizes=None, **given):
    """Sparsities and notes of blocks a, b, c..."""
    names = [str(index) for index in range(len(alphas))]
    sizes = dict(zip(names, sizes or [1000] * len(alphas)))
    shares, notes = group_sparsities(FARMS(**given), dict(zip(names, alphas)), sizes)
    return [shares[name] for name in names], notes


def test_the_map_worked_by_hand():
    assert linear_factors({"a": -2, "b": -3, "c": -5}, 0.3) == pytest.approx({"a": 0.7, "b": 0.9, "c": 1.3})
    assert shared([2, 3, 5])[0] == pytest.approx([0.506897, 0.651724, 0.941379], abs=1e-6)
    assert shared([2, 3, 5], [1000, 3000, 2000])[0] == pytest.approx([0.49, 0.63, 0.91])
    assert shared([2, 3, 5], spread=0.0)[0] == pytest.approx([0.7] * 3)


def test_the_cap_worked_by_hand():
    filled, notes = shared([2, 3, 5], sparsity=0.8)
    assert filled == pytest.approx([0.613375, 0.788625, 0.998])
    assert sum(filled) / 3 == pytest.approx(0.8)
    assert notes == ["1 of 3 would be above max_sparsity=0.998; the others take their part"]
    clamped, notes = shared([2, 3, 5], sparsity=0.8, excess="clamp")
    assert clamped[2] == 0.998  # in place of 1.075862
    assert sum(clamped) / 3 == pytest.approx(0.774046, abs=1e-6)
    assert notes == ["1 of 3 clamped to 0.998: 77.4046% instead of 80.0000%"]
    assert max(shared([2, 2, 2, 9], spread=0.6, excess="clamp")[0]) == 0.99999  # the code's other cap, at 0.7


def test_the_blocks_of_llama_7b():
    found, notes = shared(LLAMA_7B)
    assert found[0] == pytest.approx(0.4889, abs=2e-4)
    assert found[1] == pytest.approx(0.5836, abs=2e-4)
    assert found[27] == max(found) == pytest.approx(0.9080, abs=2e-4)
    assert found[31] == pytest.approx(0.7444, abs=2e-4)
    assert sum(found) / 32 == pytest.approx(0.7)
    assert found[0] / 0.7 == pytest.approx(0.6984, abs=2e-4)  # eta: the first has the smallest factor, 0.7
    assert notes == []


@given(
    st.lists(st.tuples(st.floats(1.1, 20), st.integers(1, 5000)), min_size=1, max_size=12),
    st.floats(0, 0.99),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_order_budget_and_bounds_hold_for_all(blocks, sparsity, spread):
    alphas, sizes = zip(*blocks)
    found, _ = shared(alphas, sizes, sparsity=sparsity, spread=spread)
    assert math.fsum(share * size for share, size in zip(found, sizes)) == pytest.approx(
        sparsity * sum(sizes), rel=1e-6, abs=1e-6
    )
    assert all(0 <= share <= 0.998 for share in found)
    for one, alpha in zip(found, alphas):
        assert all(one <= other + 1e-12 for other, larger in zip(found, alphas) if larger > alpha)


def test_a_block_has_the_mean_alpha_of_its_layers():
    groups = {"a": ["1", "2"], "b": ["3", "4"], "c": ["5"]}
    assert group_alphas({"1": 2.0, "2": 5.0, "4": 3.0}, groups) == {"a": 3.5, "b": 3.0}


def blocks_of(plan, structure):
    found = {}
    for block in structure.blocks:
        zeros = sum(plan.zeros(block.layers).values())
        found[block.name] = zeros / sum(layer.size for layer in block.layers)
    return found


@pytest.mark.parametrize(("method", "look"), [
    (FARMS(window=12, windows=4, sample=2, fit="mid"), Look(Windows(12, 1.0, 4, 2), "mid")),
    (FARMS(window=0), Look(Windows(16), "peak")),  # k and v have 16 outputs: the shortest side
    (AlphaPruning(fit="full"), Look(None, "full")),
])  # fmt: skip
def test_settings_reach_the_spectrum_and_alphas_the_plan(method, look):
    model = MODELS["llama"]()
    structure = structure_of(model)
    plan = method.plan(model)
    alphas = alpha_hill(model, structure, look)
    assert dict(plan.scores) == alphas
    groups = {block.name: [layer.name for layer in block.layers] for block in structure.blocks}
    sizes = {block.name: sum(layer.size for layer in block.layers) for block in structure.blocks}
    want, _ = group_sparsities(method, group_alphas(alphas, groups), sizes)
    assert blocks_of(plan, structure) == pytest.approx(want, abs=2e-4)
    assert len(set(want.values())) == 2


def test_a_layer_each():
    model = MODELS["cifar_resnet"]()
    structure = structure_of(model, include=["*"])
    plan = FARMS(per="layer", fit="mid", spread=0.2, sparsity=0.5).plan(model, structure=structure)
    shares = {name: entry.prune.sparsity for name, entry in plan.layers.items()}
    assert len({round(share, 3) for share in shares.values()}) > 5
    ranked = sorted(plan.scores, key=plan.scores.get)
    assert shares[ranked[0]] == min(shares.values())
    assert max(shares.values()) / min(shares.values()) == pytest.approx(1.5, abs=0.02)  # 1.2 / 0.8


def test_layers_outside_blocks_get_the_target():
    model = MODELS["cifar_resnet"]()
    structure = structure_of(model, include=["*"])
    plan = FARMS(sparsity=0.6).plan(model, structure=structure)
    for name in ("conv1", "fc"):
        assert plan.layers[name].prune.sparsity == pytest.approx(0.6, abs=1 / structure.layer(name).size)


def test_a_model_without_blocks_is_told_what_to_do():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3))
    structure = structure_of(model, include=["*"])
    for method in (FARMS, AlphaPruning):
        with pytest.raises(
            ModelError, match=r"Sequential has none with layers up for compression\. .*\(--set per=layer\)"
        ):
            method().plan(model, structure=structure)
        plan = method(per="layer", fit="mid").plan(model, structure=structure)
        assert plan.budget.achieved == pytest.approx(0.7, abs=1e-3)


def test_what_has_no_alpha_is_noted_and_gets_its_blocks_or_the_target(tmp_path):
    model = MODELS["llama"]()
    structure = structure_of(model)
    with torch.no_grad():
        for layer in structure.blocks[0].layers:
            model.get_parameter(layer.parameter).zero_()
        model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    plan = AlphaPruning(fit="mid").plan(model)
    first, second = structure.blocks
    assert blocks_of(plan, structure) == pytest.approx({first.name: 0.7, second.name: 0.7}, abs=1e-3)
    assert len(plan.scores) == 6
    assert len(plan.notes) == 9
    assert "model.layers.1.mlp.up_proj: no alpha" in plan.notes[7]
    assert plan.notes[-1] == "model.layers.0: none of its layers has an alpha, it gets the target"
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan  # notes are in the file
    with torch.no_grad():
        for layer in structure:
            model.get_parameter(layer.parameter).zero_()
    plan = FARMS().plan(model)
    assert plan.notes[-1] == "no layer has an alpha: uniform"
    assert blocks_of(plan, structure) == pytest.approx(dict.fromkeys(blocks_of(plan, structure), 0.7), abs=1e-3)


def test_equal_blocks_are_uniform_and_say_so():
    model = MODELS["llama"]()
    first, second = model.model.layers
    second.load_state_dict(first.state_dict())
    plan = FARMS().plan(model)
    assert plan.notes[1:] == ("all alphas are equal: uniform",)
    assert {round(entry.prune.sparsity, 2) for entry in plan.layers.values()} == {0.7}


def test_tables_alone_have_windows_of_their_shortest_side():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.randn(12, 16, generator=torch.Generator().manual_seed(0)))
    structure = structure_of(model, include=["*"])
    assert [layer.kind for layer in structure] == ["table"]
    plan = FARMS(window=0, per="layer", fit="mid").plan(model, structure=structure)
    assert dict(plan.scores) == alpha_hill(model, structure, Look(Windows(12), "mid"))


def test_matrices_smaller_than_the_windows_are_noted():
    plan = FARMS(fit="mid").plan(MODELS["llama"]())
    assert plan.notes == (
        "14 of 14 matrices are smaller than windows of 2000 rows: theirs have 16 to 32. window=0 gives all the shortest side, 16.",
    )
    assert FARMS(fit="mid", window=0).plan(MODELS["llama"]()).notes == (
        "windows of 16 rows, the shortest side of all matrices.",
    )
    assert FARMS(fit="mid", window=10).plan(MODELS["llama"]()).notes == ()


def test_the_shortest_side_is_that_of_matrices_that_windows_are_cut_from():
    """Not of ConvNeXt's depthwise kernels, which are one row a group, nor of layers outside the blocks."""
    model = MODELS["convnext"]()
    structure = structure_of(model, include=["*"])
    linears = [layer for block in structure.blocks for layer in block.layers if layer.kind == "linear"]
    side = min(min(layer.rows, layer.columns) for layer in linears)
    assert side > 1
    plan = FARMS(fit="mid", window=0).plan(model, structure=structure)
    assert plan.notes[0] == f"windows of {side} rows, the shortest side of all matrices."
    inside = {layer.name for block in structure.blocks for layer in block.layers}
    assert {*plan.scores} <= inside


def test_a_matrix_of_low_rank_has_no_alpha_and_says_so():
    model = MODELS["llama"]()
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.copy_(weight[:, :2] @ weight[:2])
    for fit in ("peak", "mid", "full"):
        plan = AlphaPruning(fit=fit).plan(model)
        assert "model.layers.0.self_attn.q_proj" not in plan.scores
        assert plan.notes[0].endswith("no alpha: 2 eigenvalues that are not zero, fewer than 5")


def test_windows_that_do_not_fit_are_noted():
    plan = FARMS(window=30, aspect=2.0, fit="mid").plan(MODELS["llama"]())
    assert any(note.endswith("its whole matrix was used") for note in plan.notes)


def test_the_published_clamp_has_the_budget_that_comes_out():
    model = MODELS["llama"]()
    structure = structure_of(model)
    plan = FARMS(sparsity=0.9, spread=0.5, excess="clamp").plan(model)
    assert max(blocks_of(plan, structure).values()) == pytest.approx(0.998, abs=1e-3)
    assert plan.budget.sparsity < 0.9
    assert plan.budget.achieved == pytest.approx(plan.budget.sparsity, abs=1e-4)
    plan.check(structure.layers)
    assert "clamped to 0.998" in plan.notes[-1]


def test_a_weight_that_is_not_finite_is_named():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("inf")
    with pytest.raises(ScoreError, match=r'layer "model\.layers\.1\.mlp\.up_proj"'):
        FARMS().plan(model)


def test_an_infeasible_budget_is_found_before_any_spectrum():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))  # would fail
    with pytest.raises(BudgetError, match=r"^50 % can go \(max_sparsity=0.5\), target 70 %."):
        FARMS(max_sparsity=0.5).plan(model)


@pytest.mark.parametrize("method", [FARMS, AlphaPruning])
@pytest.mark.parametrize("given", [{"min_sparsity": 0.2}, {"max_sparsity": 0.9}])
def test_bounds_that_the_clamp_would_not_heed_are_refused(method, given):
    (name,) = given
    assert getattr(method(**given), name) == given[name]
    with pytest.raises(ConfigError, match=rf'^{method.__name__}\.{name}=\S+ has no effect with excess="clamp"'):
        method(excess="clamp", **given)


@pytest.mark.parametrize("given", [
    {"spread": 1.0}, {"spread": 1.1}, {"spread": -0.1}, {"fit": "median"}, {"per": "model"}, {"excess": "drop"}, {"max_sparsity": 1.1},
    {"window": -1}, {"aspect": 0.0}, {"windows": 0}, {"sample": 16}, {"sample": -1},
])  # fmt: skip
def test_settings_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(ConfigError, match=name):
        FARMS(**given)
    if name in ("spread", "fit", "per", "excess", "max_sparsity"):
        with pytest.raises(ConfigError, match=name):
            AlphaPruning(**given)
