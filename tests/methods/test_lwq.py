import pytest
import torch

from layerwise.errors import BudgetError, ConfigError, ScoreError, ShapeError
from layerwise.methods import LWQ, UniformBits
from layerwise.scores import input_modification, z_score
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama

SMALL = {"group": 0, "nominal": True}


@pytest.fixture(scope="module")
def llama():
    """Six blocks of 32 x 32 attention and an MLP of 48."""
    model = small_llama(
        0, vocab_size=96, num_hidden_layers=6, hidden_size=32, intermediate_size=48, num_key_value_heads=1
    )
    data = Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})
    return model, data, structure_of(model)


def of_blocks(plan, structure):
    """Bits of each block; all layers of a block have the same."""
    found = {
        block.name: {plan.layers[layer.name].quantize.bits for layer in block.layers} for block in structure.blocks
    }
    assert all(len(bits) == 1 for bits in found.values())
    return {name: bits.pop() for name, bits in found.items()}


def lowest(scores, count):
    return set(sorted(scores, key=scores.get)[:count])


def test_those_that_change_their_input_least_get_the_low_bits(llama):
    model, data, structure = llama
    plan = LWQ(bits=3.0, **SMALL).plan(model, data)
    lim = input_modification(model, data, structure)
    low = {name for name, bits in of_blocks(plan, structure).items() if bits == 2}
    assert low == lowest(lim, 3)
    assert plan.scores == lim
    reverse = of_blocks(LWQ(bits=3.0, reverse=True, **SMALL).plan(model, data), structure)
    assert {name for name, bits in reverse.items() if bits == 4} == low


def test_those_with_the_largest_share_above_get_the_low_bits(llama):
    """ZD is low = keep: its sign is turned."""
    model, _, structure = llama
    plan = LWQ(bits=3.0, score="zd", **SMALL).plan(model)
    zd = z_score(model, structure)
    low = {name for name, bits in of_blocks(plan, structure).items() if bits == 2}
    assert low == set(zd) - lowest(zd, 3)
    assert plan.scores == {name: -share for name, share in zd.items()}


@pytest.mark.parametrize(("score", "low"), [("front", "345"), ("back", "012")])
def test_controls_by_place(llama, score, low):
    model, _, structure = llama
    bits = of_blocks(LWQ(bits=3.0, score=score, **SMALL).plan(model), structure)
    assert "".join(name[-1] for name, value in bits.items() if value == 2) == low


def test_random_orders_differ_by_seed_and_are_nested(llama):
    model, _, structure = llama
    low = {}
    for seed in range(4):
        for bits in (3.6, 3.0, 2.3):
            found = of_blocks(LWQ(bits=bits, score="random", seed=seed, **SMALL).plan(model), structure)
            low[seed, bits] = {name for name, value in found.items() if value == 2}
        assert low[seed, 3.6] < low[seed, 3.0] < low[seed, 2.3]
    assert len({frozenset(low[seed, 3.0]) for seed in range(4)}) > 1


def test_at_both_ends_it_is_uniform(llama):
    model, data, _ = llama
    for bits in (2, 4):
        entries = LWQ(bits=bits, **SMALL).plan(model, data).layers
        assert entries == UniformBits(bits=bits, group=0).plan(model).layers
        assert all("norm" not in name and "embed" not in name and "head" not in name for name in entries)


def test_true_bits_count_scales_and_zeros(llama):
    model, _, structure = llama
    layers = structure.layers
    for more, each in (
        ({}, 18 / 16),
        ({"symmetric": True}, 1.0),
        ({"shift": True}, 2.0),
        ({"scale_bits": 32}, 34 / 16),
    ):
        settings = {"group": 16, "symmetric": False, **more}
        plan = LWQ(bits=2 + each + 1e-9, score="zd", **settings).plan(model)
        assert {entry.quantize.bits for entry in plan.layers.values()} == {2}
        assert plan.budget.achieved_bits == pytest.approx(2 + each)
        assert plan.budget.nominal_bits == 2
    plan = LWQ(bits=4.2, score="zd", group=16, symmetric=False).plan(model)
    assert 3.8 < plan.budget.achieved_bits <= 4.2
    plan.check(layers)
    with pytest.raises(BudgetError, match=r"levels 2, 4 the 6 groups take 3\.125 to 5\.25 bits"):
        LWQ(bits=3.0, score="zd", group=16, symmetric=False).plan(model)
    # transformers reads no zeros of packed weights, so they are asked for
    assert not any(not entry.quantize.symmetric for entry in LWQ(score="zd", group=16).plan(model).layers.values())


def test_layers_one_by_one_and_tied_for_vllm(llama):
    model, data, structure = llama
    for score in ("zd", "lim", "random"):
        free = LWQ(bits=3.3, score=score, granularity="layer", **SMALL).plan(model, data)
        tied = LWQ(bits=3.3, score=score, granularity="layer", target="vllm", **SMALL).plan(model, data)
        for block in structure.blocks:
            bits = {layer.role: tied.layers[layer.name].quantize.bits for layer in block.layers}
            assert bits["q"] == bits["k"] == bits["v"]
            assert bits["gate"] == bits["up"]
        assert 3.1 < tied.budget.nominal_bits <= 3.3
        if score == "zd":
            assert tied.layers != free.layers
            mean = sum(free.scores[f"model.layers.0.self_attn.{one}_proj"] for one in "qkv") / 3
            assert tied.scores["model.layers.0.self_attn.q_proj"] == pytest.approx(mean)
    with pytest.raises(ConfigError, match="vLLM runs 2, 4 and 8 bits, not 3"):
        LWQ(levels="2,3,4", target="vllm")
    with pytest.raises(ConfigError, match="8 bits with zeros"):
        LWQ(levels="4,8", target="vllm", symmetric=False)
    LWQ(levels="2,4", target="vllm", symmetric=False)


def test_experts_of_a_block_are_one_for_vllm():
    model = MODELS["mixtral"]()
    settings = {"score": "zd", "granularity": "layer", "target": "vllm", **SMALL}
    plan = LWQ(bits=3.9, **settings).plan(model)
    for block in structure_of(model).blocks:
        bits = {plan.layers[layer.name].quantize.bits for layer in block.layers if layer.kind == "experts"}
        assert bits == {4}
    with pytest.raises(ConfigError, match="vLLM runs experts in 4 and 8 bits"):
        LWQ(bits=2.0, levels="2", **settings).plan(model)
    with pytest.raises(ConfigError, match="vllm reads experts without zeros alone"):
        LWQ(symmetric=False, **settings).plan(model)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_experts_of_a_model_are_one_for_transformers(granularity):
    config = MODELS["mixtral"]().config
    config.num_hidden_layers = 3
    model = type(MODELS["mixtral"]())(config)
    names = [layer.name for layer in structure_of(model) if layer.kind == "experts"]
    settings = {"score": "front", "granularity": granularity, **SMALL}

    def bits(**more):
        plan = LWQ(**settings, **more).plan(model)
        return {plan.layers[name].quantize.bits for name in names}, {e.quantize.bits for e in plan.layers.values()}

    assert bits(bits=3.5)[0] == {2, 4}
    assert bits(bits=3.5, target="transformers") == ({2}, {2, 4})
    assert bits(bits=3.5, target="transformers", pin_ends=True) == ({2}, {4, 2})
    with pytest.raises(ConfigError, match="transformers reads experts without zeros alone"):
        bits(target="transformers", symmetric=False)


def test_pinned_ends_keep_the_highest_level(llama):
    model, _, structure = llama
    bits = list(of_blocks(LWQ(bits=2.7, score="zd", pin_ends=True, **SMALL).plan(model), structure).values())
    assert bits == [4, 2, 2, 2, 2, 4]
    with pytest.raises(BudgetError, match=r"take 2\.6667 to 4 bits"):
        LWQ(bits=2.6, score="zd", pin_ends=True, **SMALL).plan(model)


def test_several_levels(llama):
    model, _, structure = llama
    bits = of_blocks(LWQ(bits=5.0, levels="2,3,4,8", score="front", **SMALL).plan(model), structure)
    assert list(bits.values()) == [8, 4, 4, 4, 4, 4]
    bits = of_blocks(LWQ(bits=5.0, levels="2,3,4,8", score="front", spread=1.0, **SMALL).plan(model), structure)
    assert list(bits.values()) == [8, 8, 8, 2, 2, 2]


def test_groups_that_do_not_divide(llama):
    model, _, _ = llama
    with pytest.raises(
        ShapeError, match=r"group=32 does not divide the inputs of 6 of 42 layers .*down_proj.*indivisible=smaller"
    ):
        LWQ(group=32, score="zd", indivisible="error").plan(model)
    plan = LWQ(bits=4.0, group=32, score="zd", indivisible="row").plan(model)
    groups = {name: entry.quantize.group for name, entry in plan.layers.items()}
    assert {groups[name] for name in groups if "down_proj" in name} == {None}
    assert {groups[name] for name in groups if "down_proj" not in name} == {32}
    assert plan.notes == ("groups of 32 do not divide the inputs of 6 layers: 6 have one scale a row.",)


def test_groups_are_halved_where_they_do_not_divide(llama):
    model, _, structure = llama
    plan = LWQ(bits=5.5, levels="4,8", group=128, score="zd").plan(model)
    columns = {layer.name: layer.columns for layer in structure.layers}
    for name, entry in plan.layers.items():
        fitting = [size for size in (128, 64, 32) if not columns[name] % size]
        assert entry.quantize.group == (fitting[0] if fitting else None)
    (note,) = plan.notes
    assert "groups of 128 do not divide" in note
    assert "one scale a row" in note


def test_what_lies_outside_the_blocks(llama):
    model, data, _ = llama
    structure = structure_of(model, include=["*"])
    plan = LWQ(bits=3.9, **SMALL).plan(model, data, structure=structure)
    assert any("have no score and are lowered last" in note for note in plan.notes)
    assert plan.layers["model.embed_tokens"].quantize.bits == 4
    timm = MODELS["timm_vit"]()
    structure = structure_of(timm, include=["*", "pos_embed"])
    plan = LWQ(bits=3.9, score="zd", **SMALL).plan(timm, structure=structure)
    assert "1 tables (gains of norms, positions) keep their bits." in plan.notes
    assert any(layer.name == "pos_embed" for layer in structure)
    assert "pos_embed" not in plan.layers


def test_a_block_without_lim_is_named():
    model = MODELS["cifar_resnet"]()
    data = Batches((inputs_for("cifar_resnet", model),), {})
    with pytest.raises(ScoreError, match=r'block "layer2\.0" changes the shape .* Use score=zd'):
        LWQ(bits=3.0, **SMALL).plan(model, data)
    assert LWQ(bits=3.0, score="zd", **SMALL).plan(model).budget.nominal_bits <= 3.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": "2,2"}, "each once"),
        ({"levels": "1,4"}, "2 to 8"),
        ({"levels": "two"}, "whole bits"),
        ({"bits": 0.0}, "more than 0"),
        ({"bits": float("nan")}, "more than 0"),
        ({"group": -1}, "group=-1"),
        ({"spread": 2.0}, "spread=2"),
        ({"score": "lm"}, 'score="lm"'),
        ({"granularity": "model"}, "block, layer"),
        ({"target": "gguf"}, "transformers, vllm"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        LWQ(**settings)


@pytest.mark.parametrize("settings", [{"bits": 9}, {"bits": 1}, {"group": -1}, {"indivisible": "skip"}])
def test_bad_settings_of_uniform_bits_name_it(settings):
    with pytest.raises(ConfigError, match=r"^UniformBits\."):
        UniformBits(**settings)


def test_the_model_stays_as_it_is(llama):
    model, data, _ = llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    LWQ(**SMALL).plan(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
