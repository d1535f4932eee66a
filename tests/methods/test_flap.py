"""FLAP: biases that count, one threshold over the whole model, and the official code's choices."""

import pytest
import torch

from layerwise.allocate.units import Sized
from layerwise.errors import DataError
from layerwise.methods import method_from
from layerwise.methods.flap import above_threshold, code_cost, standard, strictly_above
from layerwise.shrink import apply
from layerwise.structure import coupled_groups
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def data_for(model):
    return Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})


@pytest.mark.parametrize("budget", ["parameters", "bytes"])
@pytest.mark.parametrize("more", [{}, {"min_heads": 2}, {"min_channels": 64}, {"parameters": 1.0}, {"reference": True}])
def test_flap_counts_the_biases_that_it_will_give(budget, more):
    """Of attentions where one of them is cut, of MLPs likewise; none for what stays whole."""
    model = MODELS["llama"]()
    data = data_for(model)
    method = method_from("flap", **{"parameters": 0.9, "budget": budget, **more})
    plan = method.plan(model, data)
    left = apply(model, plan, data).after
    assert plan.notes[0].startswith(f"{left * (4 if budget == 'bytes' else 1):,} of ")
    assert method.reference or left <= method.parameters * sum(one.numel() for one in MODELS["llama"]().parameters())


def test_flap_s_threshold_over_the_model():
    """Check 6: of the costs kept at 0.2 and 0.5; inclusive, since the threshold's own unit stays."""
    scores = {"heads": torch.tensor([0.9, -0.4, 0.3]), "channels": torch.tensor([1.5, 0.2, -0.1, -0.8, 0.6, -1.2])}

    class Two:
        total, target = 42, 0  # costs in thirds: a head 8, a channel 3
        sized = {"heads": Sized(3, 8, least=0), "channels": Sized(6, 3, least=0)}  # noqa: RUF012

    def kept(share):
        world = Two()
        world.target = share
        return above_threshold(scores, world)

    assert kept(36) == {"heads": 3, "channels": 4}  # inclusive at -0.4: 85.7 % of the cost
    assert kept(28) == {"heads": 2, "channels": 4}
    assert kept(22) == {"heads": 2, "channels": 2}  # inclusive at 0.3: 52.4 %
    assert standard(torch.full((4, 2), 3.0)).tolist() == [0, 0, 0, 0]


def test_flap_s_threshold_in_the_code():
    """Check 6, strict: the threshold's own unit goes; 66.7 % and 33.3 % of the cost stay."""
    scores = {"heads": torch.tensor([0.9, -0.4, 0.3]), "channels": torch.tensor([1.5, 0.2, -0.1, -0.8, 0.6, -1.2])}
    costs = {"heads": 8 / 3, "channels": 1.0}
    assert strictly_above(scores, costs, 0.8) == {"heads": 2, "channels": 4}
    assert strictly_above(scores, costs, 0.5) == {"heads": 1, "channels": 2}


def test_flap_as_its_code_has_it():
    """Never more than is asked for but for what a group keeps at least; a head of h = 8 under one query head costs 4 h / 3."""
    model = MODELS["llama"]()
    data = data_for(model)
    total = sum(one.numel() for one in model.parameters())
    plan, ours = (
        method_from("flap", parameters=0.8, reference=reference).plan(model, data) for reference in (True, False)
    )
    assert plan.layers != ours.layers
    assert plan.method["reference"] is True
    left = apply(MODELS["llama"](), plan.model_copy(update={"method": {}})).after
    assert left <= 0.8 * total
    one = Batches(({"input_ids": data[0]["input_ids"][:1]},), {})
    with pytest.raises(DataError, match="second sequence"):
        method_from("flap", parameters=0.8, reference=True).plan(model, one)
    method_from("flap", parameters=0.8).plan(model, one)
    group = next(one for one in coupled_groups(MODELS["gpt2"]()).groups if one.kind == "heads")
    assert code_cost(group) == pytest.approx(4 * 8 / 3)
