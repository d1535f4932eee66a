"""Every score that takes its time says how far it is, to whoever listens, and never less than before."""

import pytest

from layerwise.methods import SynFlow
from layerwise.scores import (
    block_influence,
    first_order_gradient,
    grasp_scores,
    outlier_ratio,
    snip_scores,
    tell,
    watched,
    zeroth_order_gradient,
)
from layerwise.scores.watching import part
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for

BLOCKS = ["model.layers.0", "model.layers.1"]


def told_by(work):
    model, told = MODELS["llama"](), []
    data = Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})
    with watched(lambda *now: told.append(now)):
        work(model, data, structure_of(model))
    work(model, data, structure_of(model))  # nobody listens, nothing happens
    done, totals, _ = zip(*told)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert done[-1] == totals[-1]
    return told


@pytest.mark.parametrize(("score", "steps"), [
    (lambda *given: outlier_ratio(*given, factor=5.0), ["", *BLOCKS, ""]),
    (block_influence, [*BLOCKS, ""]),
    (first_order_gradient, ["batch 0", "batch 1", ""]),
    (snip_scores, ["gradient of batch 0", "gradient of batch 1", ""]),
    (grasp_scores, ["gradient of batch 0", "gradient of batch 1", "", "curvature of batch 0", "curvature of batch 1", ""]),
    (lambda model, data, structure: SynFlow(rounds=2).plan(model, data, structure=structure), ["round 1", "round 2", ""]),
])  # fmt: skip
def test_a_score_tells_what_it_is_at(score, steps):
    assert [now for *_, now in told_by(score)] == steps


def test_the_zeroth_order_tells_of_every_layer_in_every_batch():
    told = told_by(zeroth_order_gradient)
    assert told[0] == (0, 28, "model.layers.0.self_attn.q_proj, batch 0")
    assert told[14] == (14, 28, "model.layers.0.self_attn.q_proj, batch 1")
    assert len(told) == 29


def test_a_part_is_told_as_one_of_equal_parts():
    told = []
    with watched(lambda *now: told.append(now)):
        for number in range(3):
            with part(number, 3):
                tell(1, 4, "x")
        tell(1, 4)
    assert told == [(1, 12, "x"), (5, 12, "x"), (9, 12, "x"), (1, 4, "")]
