"""The table's arithmetic worked by hand, and that a comparison leaves the model as it found it."""

import copy
import math

import pytest
import torch

from layerwise.evaluate.compare import Cell, Recipe, best, cells, rows, verdict
from layerwise.evaluate.evaluation import Evaluation
from layerwise.io import load, load_tokenizer
from layerwise.methods import ERK, OWL, RandomRatios, Uniform
from layerwise.plan import Plan
from layerwise.solvers import Magnitude, Wanda
from layerwise.structure import structure_of
from layerwise.tasks import held_out, text
from tiny import tiny_llama, tiny_text


def cell(name, perplexity, seed=0, *, sparsity=0.5, kl=0.1, top1=0.9):
    found = Evaluation(perplexity, 100, kl, top1, 10.0, {})
    return Cell(Recipe(name, Uniform(), sparsity, seed, Wanda()), Plan(layers={}), sparsity, found, 2.0, 7, ())


def test_means_and_deviations_by_hand():
    done = [
        cell("uniform", 20.0, 0, kl=0.1),
        cell("owl", 11.0),
        cell("uniform", 22.0, 1, kl=0.3),
        cell("uniform", 24.0, 2, kl=0.2),
    ]
    uniform, owl = rows(done)
    assert (uniform.method, uniform.seeds) == ("uniform", (0, 1, 2))
    assert (uniform.perplexity, uniform.perplexity_deviation) == (22.0, 2.0)  # of the sample: sqrt((4 + 0 + 4) / 2)
    assert (uniform.kl, uniform.kl_deviation) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (owl.perplexity, owl.perplexity_deviation) == (11.0, 0.0)
    assert best([uniform, owl]) is owl


def test_a_ruined_model_has_a_row_too():
    (row,) = rows([cell("uniform", math.inf, 0), cell("uniform", 5.0, 1)])
    assert row.perplexity == math.inf
    assert row.perplexity_deviation == math.inf


def test_verdict_says_when_uniform_wins():
    said = verdict(rows([cell("uniform", 20.0), cell("random", 25.0), cell("erk", 21.0), cell("owl", 20.0)]))
    assert said == "50% with wanda: uniform is best; erk and owl did not beat it."  # a tie is no win


def test_verdict_weighs_the_gain_against_the_seeds():
    noisy = [cell("uniform", 20.0, 0), cell("uniform", 26.0, 1), cell("owl", 19.0, 0), cell("owl", 25.0, 1)]
    assert "owl is best, 22.000 beside uniform's 23.000; not more than twice" in verdict(rows(noisy))
    clear = [cell("uniform", 20.0, 0), cell("uniform", 20.2, 1), cell("owl", 18.0, 0), cell("owl", 18.2, 1)]
    assert "owl is best, 18.100 beside uniform's 20.100; more than twice" in verdict(rows(clear))
    assert "one seed" in verdict(rows([cell("uniform", 20.0), cell("owl", 18.0)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny_llama(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    path = tiny_text(folder / "text.txt")
    windows = held_out(path, tokenizer, length=32, tokens=640)
    return load(folder / "model"), [text(path, tokenizer, samples=4, length=32, seed=seed) for seed in (0, 1)], windows


def test_every_cell_starts_from_the_dense_weights(made):
    model, drawn, windows = made
    dense, structure = copy.deepcopy(model), structure_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipes = [
        Recipe(method.name, method, 0.6, seed, solver)
        for solver in (Wanda(), Magnitude())
        for method in (ERK(sparsity=0.6), OWL(sparsity=0.6), RandomRatios(sparsity=0.6), Uniform(sparsity=0.6))
        for seed in (0, 1)
    ]
    told = []
    done = list(
        cells(
            model, dense, recipes, calibration=drawn.__getitem__, held_out=windows, structure=structure, progress=told.append
        )
    )  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(abs(one.achieved - 0.6) < 1e-4 for one in done)
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert sum(one.stage == "planning" for one in told) == 8  # a plan serves every solver
    # the last cell alone gives what it gave after all the others
    (alone,) = cells(
        model, dense, recipes[-1:], calibration=drawn.__getitem__, held_out=windows, structure=structure
    )  # fmt: skip
    assert alone.evaluation == done[-1].evaluation


def test_a_caller_that_stops_finds_the_model_dense(made):
    model, drawn, windows = made
    dense = copy.deepcopy(model)
    recipe = Recipe("uniform", Uniform(), 0.5, 0, Wanda())
    walk = cells(model, dense, [recipe], calibration=drawn.__getitem__, held_out=windows, structure=structure_of(model))
    next(walk)
    assert (model.get_parameter("model.layers.0.mlp.up_proj.weight") == 0).any()  # pruned while the cell is shown
    walk.close()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_cell_that_cannot_be_made_is_told_and_the_others_go_on(made):
    model, drawn, windows = made
    dense = copy.deepcopy(model)

    class Broken(Uniform):
        def plan(self, model, data=None, *, structure=None):
            raise RuntimeError("CUDA out of memory")

    recipes = [Recipe(name, kind(), 0.5, 0, Magnitude()) for name, kind in (("broken", Broken), ("uniform", Uniform))]
    told = []
    asked = {"calibration": drawn.__getitem__, "held_out": windows, "structure": structure_of(model)}
    done = list(
        cells(model, dense, recipes, **asked, failed=lambda recipe, error: told.append((recipe.name, str(error))))
    )
    assert [one.recipe.name for one in done] == ["uniform"]
    assert told == [("broken", "CUDA out of memory")]
    with pytest.raises(RuntimeError, match="out of memory"):
        list(cells(model, dense, recipes, **asked))


def test_verdict_without_uniform():
    assert verdict(rows([cell("owl", 18.0)])).endswith("owl is best, with no uniform to hold it against.")
