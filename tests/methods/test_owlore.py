"""OwLore: probabilities by outliers, a plan that can be edited and trained by, and what is not to be trained refused."""

import copy
import dataclasses

import pytest
import torch

from layerwise.engine import compress
from layerwise.errors import ConfigError, DataError, ModelError, PlanError
from layerwise.methods import METHODS, OwLore, Uniform, method_from
from layerwise.plan import Plan, Train, Treatments
from layerwise.recover import LowRank, LowRankAdam
from layerwise.scores import outlier_ratio
from layerwise.solvers import Magnitude
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama

SMALL = {"blocks": 1, "period": 2, "rank": 4, "outlier_factor": 2.0}


def four():
    model = small_llama(num_hidden_layers=4)
    with torch.no_grad():  # more outliers in the second, none in the last
        model.model.layers[1].mlp.up_proj.weight[:2] *= 20
        for parameter in model.model.layers[3].parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.sign() * 0.02)
    return model


def data(seeds=2):
    ids = [torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return Batches(tuple({"input_ids": one} for one in ids), {})


def shares(plan):
    return {name: entry.train.probability for name, entry in plan.layers.items()}


def test_probabilities_are_outliers_over_their_sum():
    model, structure = four(), structure_of(four())
    before = copy.deepcopy(model.state_dict())
    plan = OwLore(**SMALL).plan(model, data())
    ratios = outlier_ratio(model, data(), structure, 2.0)
    assert dict(plan.scores) == ratios
    assert shares(plan) == pytest.approx({name: ratio / sum(ratios.values()) for name, ratio in ratios.items()})
    assert "budget" not in plan.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert OwLore(**SMALL).plan(model, data()).to_yaml() == plan.to_yaml()
    floored = shares(OwLore(**SMALL, floor=0.2).plan(model, data()))
    assert floored == pytest.approx({name: 0.8 * share + 0.05 for name, share in shares(plan).items()})
    turned = shares(OwLore(**SMALL, score="reverse").plan(model, data()))
    assert turned[max(ratios, key=ratios.get)] == 0
    assert sorted(turned, key=turned.get) == sorted(ratios, key=ratios.get, reverse=True)


@pytest.mark.parametrize(
    ("score", "wanted"), [("uniform", [1, 1, 1, 1]), ("decrease", [4, 3, 2, 1]), ("increase", [1, 2, 3, 4])]
)
def test_controls_need_no_data(score, wanted):
    method = OwLore(**{**SMALL, "score": score})
    assert not method.needs_data
    assert list(shares(method.plan(four())).values()) == pytest.approx([one / sum(wanted) for one in wanted])


def test_a_model_without_outliers_is_trained_evenly_and_says_so():
    plan = OwLore(**{**SMALL, "outlier_factor": 1e4}).plan(four(), data())
    assert set(shares(plan).values()) == {0.25}
    assert plan.notes == (
        "no block has scores more than 10000 times its mean, so all have the same probability; a lower outlier_factor may tell them apart",
    )


def test_fewer_blocks_with_outliers_than_are_asked_for_is_an_error():
    model = four()
    ratios = outlier_ratio(model, data(), structure_of(model), 6.0)
    able = sum(value > 0 for value in ratios.values())
    assert 0 < able < 4
    OwLore(**{**SMALL, "outlier_factor": 6.0, "blocks": able}).plan(model, data())
    with pytest.raises(ConfigError, match=rf"{able} of 4 blocks have outliers .* Lower outlier_factor \(6\)"):
        OwLore(**{**SMALL, "outlier_factor": 6.0, "blocks": 4}).plan(model, data())
    OwLore(**{**SMALL, "outlier_factor": 6.0, "blocks": 4, "floor": 0.1}).plan(model, data())


def test_a_plan_survives_and_is_trained_by():
    model = four()
    plan = Plan.from_text(OwLore(**SMALL, state="offload", always="*norm*, lm_head*").plan(model, data()).to_yaml())
    sampling = method_from(**plan.method).sampling(model, plan)
    assert sampling.probabilities == pytest.approx(shares(plan))
    assert (sampling.count, sampling.period, sampling.state) == (1, 2, "offload")
    assert sampling.low_rank == LowRank(4)
    optimizer = LowRankAdam(sampling.groups(1e-2))
    sampling.watch(optimizer)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for step in range(4):
        sampling.at(step)
        ids = data()[0]["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
    full = OwLore(**{**SMALL, "rank": 0, "always": ""}).sampling(model, plan)
    assert full.low_rank is None
    assert full.state == "reset"


def test_edits_by_hand_count():
    model = four()
    plan = OwLore(**SMALL).plan(model, data())
    blocks = list(plan.layers)
    text = plan.to_yaml().replace(f"probability: {shares(plan)[blocks[0]]!r}", "probability: 0, rate: 0.5")
    edited = Plan.from_text(text)
    sampling = OwLore(**SMALL).sampling(model, edited)
    assert sampling.probabilities[blocks[0]] == 0
    assert sum(sampling.probabilities.values()) == pytest.approx(1)
    assert sampling.rates == {blocks[0]: 0.5}
    assert all(blocks[0] not in sampling.drawn(period) for period in range(50))


def test_a_plan_of_another_model_or_of_layers_is_refused():
    plan = OwLore(**SMALL).plan(four(), data())
    other = small_llama(num_hidden_layers=3)
    with pytest.raises(PlanError, match=r"it was made for .* this model has other parameters"):
        OwLore(**SMALL).sampling(other, plan)
    with pytest.raises(PlanError, match="the model has no layer or block of this name"):
        OwLore(**SMALL).sampling(other, plan.model_copy(update={"model": None}))
    layer = Plan(layers={"model.layers.0.mlp.up_proj": Train(probability=0.5)})
    with pytest.raises(
        PlanError, match=r"train\.probability is of a whole block, and this is none\. Name a block such as"
    ):
        OwLore(**SMALL).sampling(four(), layer)
    with pytest.raises(PlanError, match="no entry has a probability"):
        OwLore(**SMALL).sampling(four(), Plan(layers={"model.layers.0": Train(rate=0.5)}))


def test_a_plan_prunes_and_says_how_it_is_trained():
    """What is said of training changes no weight, and the zeros are those of the plan without it."""
    model, twin = four(), four()
    pruned = Uniform(sparsity=0.5).plan(model)
    both = pruned.model_copy(
        update={"layers": {**pruned.layers, "model.layers.0": Treatments(train=Train(probability=1.0))}}
    )
    assert compress(model, both, solver=Magnitude()).zeros == compress(twin, pruned, solver=Magnitude()).zeros > 0
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "vit", "cifar_resnet", "llava"])
def test_any_model_with_blocks(name):
    model = MODELS[name]()
    batches = Batches((inputs_for(name, model),), {})
    plan = OwLore(**SMALL, floor=0.1).plan(model, batches)
    assert list(plan.layers) == [block.name for block in structure_of(model).blocks if block.layers]
    assert sum(shares(plan).values()) == pytest.approx(1)
    OwLore(**SMALL).sampling(model, plan)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(DataError, match="needs calibration data"):
        OwLore(**SMALL).plan(four())
    with pytest.raises(ConfigError, match="blocks=5: 4 blocks can be drawn"):
        OwLore(**{**SMALL, "blocks": 5}).plan(four(), data())
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    with pytest.raises(ModelError, match="OwLore draws blocks, and Sequential has none"):
        OwLore(**SMALL).plan(model, data(), structure=structure_of(model, include=["*"]))
    frozen = four()
    frozen.requires_grad_(False)
    with pytest.raises(ModelError, match="none of its 4 blocks has a parameter that is trained"):
        OwLore(**SMALL).sampling(frozen, OwLore(**SMALL).plan(frozen, data()))


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "outlier"}, {"draw": "coin"}, {"state": "lose"}, {"outlier_factor": 1.0}, {"floor": 1.5}, {"blocks": 0}, {"period": 0},
        {"rank": -1}, {"gap": -1}, {"scale": 0.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        OwLore(**settings)
    assert "\n" not in str(caught.value)


def test_it_is_in_the_table_with_plain_settings():
    assert METHODS["owlore"] is OwLore
    assert OwLore.__dataclass_params__.frozen
    assert all(type(value) in (int, float, str) for value in dataclasses.asdict(OwLore()).values())
