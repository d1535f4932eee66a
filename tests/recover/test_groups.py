"""Parameter groups from a plan: every trained parameter once, rates of the nearest name, matrices in blocks projected."""

import pytest
import torch

from layerwise.errors import PlanError
from layerwise.plan import Plan, Prune, Train
from layerwise.recover import LowRank, TempBalance, parameter_groups, probabilities_of, rates_of
from layerwise.scores import Look
from models import MODELS

BLOCK = "model.layers.1"


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def test_every_parameter_once_with_the_rate_of_the_longest_name():
    model = MODELS["llama"]()
    rates = {BLOCK: 0.5, f"{BLOCK}.mlp.up_proj": 2.0, "model.embed_tokens": 0.0, "lm_head.weight": 3.0}
    groups = by_name(model, parameter_groups(model, 0.1, weight_decay=0.01, rates=rates))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        own = [key for key in rates if name == key or name.startswith(f"{key}.")]
        assert group["lr"] == 0.1 * rates[max(own, key=len)] if own else 0.1
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.01)
        assert "rank" not in group
    torch.optim.AdamW(parameter_groups(model, 0.1, rates=rates))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral", "cifar_resnet"])
def test_matrices_in_blocks_are_projected_whatever_they_are_called(name):
    model = MODELS[name]()
    groups = by_name(model, parameter_groups(model, 0.1, low_rank=LowRank(4, 7, 0.25)))
    inside = {
        "llama": r"layers\.\d+\..*proj\.weight",
        "opt": r"layers\.\d+\..*(proj|fc\d)\.weight",
        "gpt2": r"h\.\d+\..*(c_\w+)\.weight",
        "mixtral": r"layers\.\d+\.(self_attn.*weight|mlp\.(experts\.\w+|gate\.weight))$",
        "cifar_resnet": "nothing",
    }[name]
    import re

    for parameter, group in groups.items():
        assert ("rank" in group) == bool(re.search(inside, parameter)), parameter
        if "rank" in group:
            assert (group["rank"], group["gap"], group["scale"]) == (4, 7, 0.25)


def test_frozen_parameters_are_in_no_group():
    model = MODELS["llama"]()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in by_name(model, parameter_groups(model, 0.1))


def test_rates_of_another_model_are_refused():
    with pytest.raises(PlanError) as caught:
        parameter_groups(MODELS["llama"](), 0.1, rates={"model.layers.7": 0.5, "encoder": 2.0, BLOCK: 1.0})
    assert [line.split('"')[1] for line in caught.value.problems] == ["model.layers.7", "encoder"]
    tied = MODELS["qwen2"]()  # lm_head is the other name of the embedding
    parameter_groups(tied, 0.1, rates={"lm_head": 0.5})


def test_a_plan_says_rates_and_probabilities():
    plan = Plan(
        layers={BLOCK: Train(rate=0.5, probability=0.25), "b": Train(probability=0.75), "c": Prune(sparsity=0.5)}
    )
    assert rates_of(plan) == {BLOCK: 0.5}
    assert probabilities_of(plan) == {BLOCK: 0.25, "b": 0.75}
    assert Plan.from_text(plan.to_yaml()) == plan
    with pytest.raises(PlanError, match="no entry has a probability"):
        probabilities_of(Plan(layers={"c": Prune(sparsity=0.5)}))


def test_temp_balance_as_a_plan_that_trains():
    model = MODELS["llama"]()
    balance = TempBalance(model, look=Look(None, "mid", fewest=5))
    assert not balance.plan().layers
    alphas = balance.update()
    plan = Plan.from_text(balance.plan().to_yaml())
    assert rates_of(plan) == balance.factors
    assert dict(plan.scores) == alphas
    groups = by_name(model, parameter_groups(model, 0.1, rates=rates_of(plan)))
    for name, factor in balance.factors.items():
        assert groups[f"{name}.weight"]["lr"] == pytest.approx(0.1 * factor)
