"""What vLLM cannot run, said before any work; and its matching of fused layers, imitated on what we write."""

import pytest

from layerwise.errors import ConfigError, PlanError
from layerwise.io import check_plan, target_of
from layerwise.io.pack_quantized import Scheme
from layerwise.io.packed_config import config_of
from layerwise.io.targets import vllm_problems
from layerwise.plan import Plan, Prune, Quantize
from layerwise.structure.fused import fused_of

ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEARS = [*ATTENTION, *MLP, "lm_head"]
FOUR = Scheme(4, 128, False)


def test_which_layers_go_together():
    experts = [f"layers.1.mlp.experts.{number}.{name}_proj" for number in (0, 1) for name in ("gate", "up", "down")]
    assert fused_of([*LINEARS, *experts]) == [tuple(ATTENTION[:3]), tuple(MLP[:2]), tuple(experts)]
    assert fused_of(["a.q_proj", "b.k_proj", "b.o_proj"]) == []
    linear = [f"layers.0.linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")]
    latent = [f"layers.1.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
    assert fused_of([*linear, *latent]) == [tuple(linear[:2]), tuple(linear[2:]), (latent[0], latent[2])]


def test_one_scheme_each_is_fine():
    assert vllm_problems(dict.fromkeys([*ATTENTION, *MLP], FOUR), LINEARS) == []
    assert vllm_problems(dict.fromkeys(ATTENTION[:3], FOUR) | {MLP[2]: Scheme(8, None, True)}, LINEARS) == []


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme(3, 128, True), "Take 2, 4 or 8"),
        (Scheme(4, 16, True), "no groups of 16"),
        (Scheme(8, 128, False), "8 bits with zeros"),
    ],
)
def test_schemes_without_a_kernel(scheme, says):
    (problem,) = vllm_problems({MLP[2]: scheme}, LINEARS)
    assert problem.startswith(f"vllm: 1 layer ({MLP[2]}): ")
    assert says in problem


def test_parts_of_a_fused_layer_that_differ_are_listed():
    schemes = {ATTENTION[0]: FOUR, ATTENTION[1]: Scheme(8, 128, True), ATTENTION[2]: FOUR, MLP[0]: FOUR}
    first, second = vllm_problems(schemes, LINEARS)
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn as one" in first
    assert "and 1 more 4 bits, groups of 128, asymmetric" in first
    assert "up_proj not quantised" in second


def test_a_plan_is_refused_with_every_reason():
    quantize = Quantize(bits=3, group=64)
    plan = Plan(layers={ATTENTION[3]: quantize, MLP[0]: Quantize(bits=4), MLP[2]: Prune(sparsity=0.5)})
    check_plan(plan, LINEARS, "transformers")
    with pytest.raises(PlanError) as error:
        check_plan(plan, LINEARS, "vllm")
    assert len(error.value.problems) == 2


def test_unknown_target():
    with pytest.raises(ConfigError, match="give transformers or vllm"):
        target_of("llama.cpp")


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def engine_scheme(layer: str, config: dict) -> tuple | None:
    """What vLLM does with one of its layers: ignored if all parts are, an error if some are; else the first part's group."""
    above, _, own = layer.rpartition(".")
    parts = [f"{above}.{part}" for part in FUSED.get(own, [own])]
    ignored = {part in config["ignore"] for part in parts}
    if len(ignored) > 1:
        raise ValueError("different schemes")
    if ignored == {True}:
        return None
    groups = [next(key for key, group in config["config_groups"].items() if part in group["targets"]) for part in parts]
    weights = config["config_groups"][groups[0]]["weights"]
    return weights["num_bits"], weights["group_size"], weights["symmetric"]


@pytest.mark.parametrize(
    "schemes",
    [
        dict.fromkeys([*ATTENTION, *MLP], FOUR),
        dict.fromkeys(ATTENTION[:3], Scheme(2, 64, True))
        | dict.fromkeys(MLP[:2], FOUR)
        | {ATTENTION[3]: Scheme(8, None, True)},
    ],
)
def test_what_passes_is_matched_by_the_engine_as_it_was_meant(schemes):
    assert vllm_problems(schemes, LINEARS) == []
    config = config_of(schemes, LINEARS)
    for fused, part in (("self_attn.qkv_proj", ATTENTION[0]), ("mlp.gate_up_proj", MLP[0]), ("mlp.down_proj", MLP[2])):
        own = schemes.get(part)
        meant = (own.bits, own.group, own.symmetric) if own else None
        assert engine_scheme(f"model.layers.0.{fused}", config) == meant
