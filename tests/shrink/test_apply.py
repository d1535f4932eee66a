"""Plans of widths and depth carried out: which units, biases in the place of what goes, what is refused."""

import copy

import pytest
import torch
import transformers

from layerwise.errors import ConfigError, DataError, PlanError
from layerwise.io import load, save
from layerwise.plan import Plan, Prune, Resize, Treatments
from layerwise.scores.units import magnitudes
from layerwise.shrink import apply, shrink
from layerwise.structure import coupled_groups
from layerwise.tasks.batches import Batches
from layerwise.treatments import kept_text
from models import DECODER, MODELS, inputs_for

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


def data(model, name="llama"):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})


def test_the_units_that_the_plan_names_stay():
    model, other = MODELS["llama"](), MODELS["llama"]()
    plan = Plan(
        layers={MLP: Resize(channels=3, kept="xa400000000000000"), ATTENTION: Resize(heads=2, kv_heads=1, kept="x4")}
    )
    applied = apply(model, plan)
    shrink(other, {MLP: [0, 2, 5], ATTENTION: [1]})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert applied.before - applied.after == 61 * 96 + 2 * 8 * 32 * 3


def test_without_names_those_of_the_largest_weights_stay():
    model = MODELS["llama"]()
    group = coupled_groups(model)[MLP]
    best = magnitudes(model, [group])[MLP].argsort(descending=True)[:5].sort().values
    expected = model.model.layers[0].mlp.up_proj.weight[best].detach().clone()
    apply(model, Plan(layers={MLP: Resize(channels=5)}))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_a_channel_that_never_changes_goes_at_no_cost(tmp_path):
    """Its mean through the weights that read it becomes a bias, which Llama's config can say."""
    model = MODELS["llama"]().eval().double()
    batches = data(model)
    constant = copy.deepcopy(model)
    with torch.no_grad():
        for one in (model, constant):
            mlp = one.model.layers[0].mlp
            mlp.act_fn = torch.nn.Identity()
            mlp.gate_proj.weight[7] = 0
            mlp.up_proj.weight[7] = 0
    plan = Plan(
        layers={MLP: Resize(channels=63, kept="xfeffffffffffffff")}, method={"name": "flap", "compensate": True}
    )
    with pytest.raises(DataError, match="biases"):
        apply(model, plan)
    apply(model, plan, batches)
    assert model.config.mlp_bias is True
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, constant(**batch).logits, rtol=0, atol=1e-6)
    save(model, tmp_path / "out", verify=False)
    again = load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_heads_and_channels_that_are_constant_go_at_no_cost():
    """FLAP, check 4, with constants that are not zero, in float64."""
    model = MODELS["opt"]().eval().double()
    layer, batches = model.model.decoder.layers[0], data(model, "opt")
    rows = slice(8, 16)  # of the second head
    with torch.no_grad():
        for linear, gone, value in ((layer.self_attn.v_proj, rows, 0.3), (layer.fc1, 7, 0.5)):
            linear.weight[gone], linear.bias[gone] = 0, value
    constant, plain = copy.deepcopy(model), copy.deepcopy(model)
    groups = {group.kind: group for group in coupled_groups(model).groups if ".0" in group.name}
    heads, channels = groups["heads"], groups["channels"]
    layers = {
        heads.name: Resize(heads=3, kv_heads=3, kept=kept_text(unit != 1 for unit in range(4))),
        channels.name: Resize(channels=channels.units - 1, kept=kept_text(unit != 7 for unit in range(channels.units))),
    }
    apply(model, Plan(layers=layers, method={"compensate": True}), batches)
    apply(plain, Plan(layers=layers))
    for batch in batches:
        with torch.no_grad():
            wanted = constant(**batch).logits
            torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=1e-6)
            assert not torch.allclose(plain(**batch).logits, wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_compensation_brings_outputs_nearer(name):
    dense, plain, biased = (MODELS[name]().eval() for _ in range(3))
    batches = data(dense, name)
    groups = [group for group in coupled_groups(dense).groups if group.kind == "channels"]
    with torch.no_grad():
        for model in (dense, plain, biased):
            for module in model.modules():  # activations with a mean of their own
                if getattr(module, "bias", None) is not None and isinstance(module.bias, torch.nn.Parameter):
                    module.bias.fill_(0.05)
    layers = {group.name: Resize(channels=group.units // 2) for group in groups}
    apply(plain, Plan(layers=layers))
    applied = apply(biased, Plan(layers=layers, method={"compensate": True}), batches)
    with torch.no_grad():
        wanted = dense(**batches[0]).logits
        errors = [float((one(**batches[0]).logits - wanted).square().mean()) for one in (biased, plain)]
    if name == "qwen2":
        assert "left without" in applied.notes[0]
    else:
        assert errors[0] < errors[1]


def test_what_does_not_fit_is_listed_before_anything_is_cut():
    model = MODELS["llama"]()
    shapes = [one.shape for one in model.parameters()]
    plan = Plan(
        layers={
            MLP: Resize(channels=65),
            ATTENTION: Resize(channels=3),
            "model.layers.1.self_attn": Resize(heads=3, kv_heads=1),
            "model.layers.1.mlp": Treatments(resize=Resize(channels=8)),
            "model.norm": Resize(channels=8),
            "model.layers.1.mlp.up_proj": Prune(sparsity=0.5),
        }
    )
    with pytest.raises(PlanError) as caught:
        apply(model, plan)
    text = str(caught.value)
    for said in (
        "1 to 64 can be kept, not 65",
        "has heads",
        "3 query heads are not 2 for each of 1",
        "model.norm",
        "prune does not go",
    ):
        assert said in text
    assert [one.shape for one in model.parameters()] == shapes


def test_blocks_that_cannot_go_are_found_before_anything_is_cut():
    model = MODELS["llama"]()
    before = {name: one.shape for name, one in model.named_parameters()}
    plan = Plan(
        layers={MLP: Resize(channels=8), ATTENTION: Resize(heads=2, kv_heads=1)}
        | {"model.layers.1": Treatments(drop=True)}
    )
    two = plan.model_copy(update={"layers": {f"model.layers.{i}": Treatments(drop=True) for i in range(2)}})
    both = two.model_copy(update={"layers": {**two.layers, MLP: Treatments(resize=Resize(channels=8))}})
    for wrong in (two, both):
        with pytest.raises(ConfigError, match="Keep at least one"):
            apply(model, wrong)
        assert {name: one.shape for name, one in model.named_parameters()} == before
    apply(model, plan)
    assert model.config.num_hidden_layers == 1


def test_channels_of_experts_that_cannot_run_are_a_problem_of_the_plan():
    model = MODELS["mixtral"]()
    with pytest.raises(PlanError, match="multiples of 8"):
        apply(model, Plan(layers={"model.layers.0.mlp.experts": Resize(channels=12)}))


def test_a_flag_that_means_other_linears_gives_no_bias():
    """GLM's attention_bias is of queries, keys and values: its class would build no place for the means of o."""
    config = transformers.GlmConfig(**DECODER, head_dim=8, attention_bias=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GlmForCausalLM(config).eval()
    plan = Plan(layers={ATTENTION: Resize(heads=2, kv_heads=1)}, method={"compensate": True})
    applied = apply(model, plan, data(model))
    assert "left without" in applied.notes[0]
    assert model.config.attention_bias is False
    assert not any("bias" in name for name, _ in model.named_parameters())
