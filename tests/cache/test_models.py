"""Which models and plans have a cache that can be quantised, and what is said of those that have not."""

import pytest
import torch
from transformers import AutoConfig

import layerwise as lw
from caches import CONFIGS, tiny
from layerwise.cache import QuantizedKVCache, Scheme, pairs_of, parse_pair, true_bits
from layerwise.errors import ConfigError, ModelError, PlanError, ShapeError
from layerwise.plan import CacheBits, Plan, Prune, Treatments
from layerwise.randomness import generator_for
from layerwise.tasks import Batches
from models import MODELS, small_llama

LAYERS = 3
ATTENTIONS = [f"model.layers.{index}.self_attn" for index in range(LAYERS)]


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=LAYERS)


def plan(*pairs, names=ATTENTIONS, **scheme):
    bits = [CacheBits(key_bits=keys, value_bits=values, **scheme) for keys, values in pairs]
    return Plan(layers=dict(zip(names, bits)))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("mamba", r"mamba has no attention with a KV cache that grows with the text \(state of fixed size\)"),
        ("rwkv", r"rwkv has no KV cache: it keeps a state of fixed size"),
        ("xlstm", r"xlstm has no KV cache"),
        ("recurrent_gemma", r"recurrent_gemma has no attention .* \(sliding window, state of fixed size\)"),
        ("deepseek_v3", r"deepseek_v3 has multi-head latent attention \(MLA\)"),
        ("t5", r"t5 is an encoder-decoder model"),
        ("minimax", r"minimax has a cache of its own kind \(MiniMaxCache\), for the states of its linear attention"),
    ],
)
def test_models_without_a_usual_cache_are_named(kind, line):
    with pytest.raises(ModelError, match=line):
        QuantizedKVCache.uniform(8, 4, AutoConfig.for_model(kind))


def test_state_layers_of_a_hybrid_stay_as_they_are():
    config = AutoConfig.for_model("jamba")
    cache = QuantizedKVCache.uniform(8, 4, config)
    (note,) = cache.notes
    assert note == "layers 0, 1, 2, 3, 5, 6, … (28 in all): full precision, not fewer bits (state of fixed size)."
    with pytest.raises(PlanError, match=r"cache bits to layers that cannot have them: layer 0: full precision"):
        QuantizedKVCache.from_plan(plan((8, 4), names=["model.layers.0.mamba"]), config)
    assert QuantizedKVCache.from_plan(plan((8, 4), names=["model.layers.4.self_attn"]), config).notes == ()


@pytest.mark.parametrize("kind", CONFIGS)
def test_attentions_that_are_written_otherwise_have_the_usual_cache(kind):
    """Also beside a state in the same layer (Falcon-H1, Zamba)."""
    model, prompt = tiny(kind), torch.randint(3, 60, (2, 9), generator=generator_for(0, "ids"))
    same = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    exact = QuantizedKVCache.uniform(16, 16, model.config)
    want = model.generate(prompt, **same)
    assert torch.equal(model.generate(prompt, past_key_values=exact, **same), want)
    exact.reset()
    assert torch.equal(model.generate(prompt, past_key_values=exact, **same), want)
    beams = {**same, "num_beams": 3}
    assert torch.equal(model.generate(prompt, past_key_values=exact.fresh(), **beams), model.generate(prompt, **beams))
    few = QuantizedKVCache.uniform(4, 2, model.config, quantize_prefill=True)
    data = Batches(({"input_ids": prompt},), {})
    assert lw.evaluate(model, data, against=model, cache=few).kl > 0
    assert few.notes == (("layer 0: full precision, not fewer bits (state of fixed size).",) if kind == "zamba" else ())
    model(input_ids=prompt, past_key_values=few)
    assert few.long_run()[0] == pytest.approx(true_bits([(4, 2)], few.scheme, 8))


def test_what_does_not_fit_is_refused_before_anything_runs(model):
    def refused(kind, line, *args, **settings):
        with pytest.raises(kind, match=line):
            QuantizedKVCache(*args, **settings)

    config = model.config
    refused(ConfigError, r"pairs is empty", [])
    refused(ConfigError, r"bits \(3, 4\): give those of keys and of values, each 2, 4, 8, or 16", [(3, 4)])
    refused(ConfigError, r"2 pairs of bits for a model with 3 decoder layers", [(8, 4)] * 2, config=config)
    refused(ConfigError, r'mode="kiwi": give "per-token" or "kivi"', [(8, 4)], mode="kiwi")
    refused(ConfigError, r"group=0: give the numbers", [(8, 4)], group=0)
    refused(ConfigError, r"residual=-1: give the tokens", [(8, 4)], residual=-1)
    refused(ConfigError, r"residual=8 is less than group=32", [(8, 4)], mode="kivi", residual=8)
    refused(ConfigError, r"config=Llama.*: give the config of a transformers model", [(8, 4)] * 3, config=model)
    refused(
        ShapeError, r"layer 1: heads of 8 channels do not split into groups of 32 \(values, mode kivi\)\. Give a group that divides 8",
        [(16, 16), (8, 4), (8, 4)], mode="kivi", config=config,
    )  # fmt: skip
    odd = small_llama(head_dim=6).config
    refused(
        ShapeError,
        r"layer 0: heads of 6 channels in 2 bits do not fill whole bytes \(values\)",
        [(4, 2)] * 2,
        config=odd,
    )


@torch.no_grad()
def test_without_a_config_it_shows_when_the_model_runs(model):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ModelError, match=r"the model has a layer 2, the cache is for 2 layers"):
        model(input_ids=ids, past_key_values=QuantizedKVCache([(8, 4)] * 2))
    cache = QuantizedKVCache([(8, 4)] * 4)
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ModelError, match=r"the model has filled 3 of the cache's 4 layers"):
        model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ShapeError, match=r"layer 0: heads of 8 channels do not split into groups of 3"):
        model(input_ids=ids, past_key_values=QuantizedKVCache([(8, 4)] * 3, group=3))


def test_from_plan(model):
    made = QuantizedKVCache.from_plan(plan((8, 4), (2, 2), mode="kivi", group=4, residual=8), model.config)
    assert made.pairs == ((8, 4), (2, 2), (16, 16))
    assert made.scheme == Scheme("kivi", 4, 8)
    assert not made.quantize_prefill
    assert QuantizedKVCache.from_plan(plan((8, 4)), model.config, quantize_prefill=True).fresh().quantize_prefill
    alone = QuantizedKVCache.from_plan(plan((8, 4), (2, 2), mode="kivi", group=4, residual=8))
    assert (alone.pairs, alone.scheme) == (made.pairs[:2], made.scheme)
    with pytest.raises(PlanError, match="attention"):
        QuantizedKVCache.from_plan(plan((8, 4), names=["model.norm"]))
    assert made.name == "K8.66667V7.33333 kivi, group 4, residual 8"


def test_all_problems_of_a_plan_are_listed():
    names = ["model.layers.0.self_attn", "model.layers.9.self_attn", "model.norm", "vision.layers.0.self_attn"]
    bad = plan((8, 4), (8, 4), (8, 4), (8, 4), names=names)
    bad.layers["model.layers.1.self_attn"] = Treatments(cache=CacheBits(key_bits=8, value_bits=4, mode="kivi"))
    with pytest.raises(PlanError) as caught:
        pairs_of(bad, 3)
    nine, norm, vision, kivi = caught.value.problems
    assert nine.startswith(
        'plan: "model.layers.9.self_attn": the model has 3 decoder layers, and this is none\'s attention.'
    )
    assert norm.startswith('plan: "model.norm": the model has 3 decoder layers')
    assert '"model.layers.0.self_attn" and "vision.layers.0.self_attn" are both of layer 0' in vision
    assert '"model.layers.1.self_attn" and "model.layers.0.self_attn" differ in mode, group or residual' in kivi
    with pytest.raises(PlanError, match="no entry has cache"):
        pairs_of(Plan(layers={"a": Prune(sparsity=0.5)}), 3)


def test_a_plan_with_cache_bits_is_written_and_read(tmp_path):
    made = plan((8, 4), (4, 2), mode="kivi", group=16)
    made.save(tmp_path / "plan.yaml")
    assert "{cache: {key_bits: 8, value_bits: 4, mode: kivi, group: 16}}" in (tmp_path / "plan.yaml").read_text()
    assert Plan.load(tmp_path / "plan.yaml") == made
    short = Plan.from_text("layerwise: 1\nlayers:\n  a.0.attn: {cache: {key_bits: 8, value_bits: 4}}\n")
    assert short.layers["a.0.attn"].cache == CacheBits(key_bits=8, value_bits=4, mode="per-token")


@pytest.mark.parametrize(
    ("name", "first"),
    [("llama", "model.layers.0.self_attn"), ("gpt2", "transformer.h.0.attn"), ("gemma3", "model.layers.0.self_attn")],
)
def test_attentions_of_a_model(name, first):
    model = MODELS[name]()
    structure = lw.structure_of(model)
    assert structure.attentions[0] == first
    assert len(structure.attentions) == model.config.num_hidden_layers
    assert lw.structure_of(model, include=["*mlp*"]).attentions == structure.attentions


def test_a_plan_is_checked_against_the_attentions(model):
    structure = lw.structure_of(model)

    def problems(made):
        with pytest.raises(PlanError) as caught:
            made.check(structure.layers, blocks=[b.name for b in structure.blocks], attentions=structure.attentions)
        return caught.value.problems

    plan((8, 4), (8, 4)).check(structure.layers, attentions=structure.attentions)
    wrong = plan(
        (8, 4), (8, 4), (8, 4), names=["model.layers.0", "model.layers.0.mlp.up_proj", "model.layers.0.self_atn"]
    )
    block, weight, unknown = problems(wrong)
    assert block.endswith("cache is of an attention, and this is none. Name one such as model.layers.0.self_attn.")
    assert weight.endswith("cache is of an attention, and this is none. Name one such as model.layers.0.self_attn.")
    assert 'Did you mean "model.layers.0.self_attn"?' in unknown


def test_weights_and_cache_in_one_plan(model, tmp_path):
    both = plan((8, 4), (4, 4), (2, 2))
    layers = {**both.layers, "model.layers.0.mlp.up_proj": Treatments(prune=Prune(sparsity=0.5))}
    both = both.model_copy(update={"layers": layers})
    mine = small_llama(num_hidden_layers=LAYERS)
    result = lw.compress(mine, both, solver=lw.solvers.Magnitude())
    assert [layer.layer for layer in result.layers] == ["model.layers.0.mlp.up_proj"]
    assert result.sparsity == 0.5
    saved = lw.save(mine, tmp_path / "out", plan=both)
    (line,) = [line for line in saved.lines() if line.startswith("KV cache")]
    assert line.startswith(
        "KV cache of 3 layers, 4.66667 bits for keys and 3.33333 for values in the mean: not in the weights"
    )
    cache, again = lw.load_cache(tmp_path / "out"), lw.load(tmp_path / "out")
    assert cache.pairs == ((8, 4), (4, 4), (2, 2))
    ids = torch.tensor([[5, 6, 7, 8]])
    own = mine.generate(
        ids, past_key_values=QuantizedKVCache.from_plan(both, mine.config), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(again.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), own)
    lw.save(mine, tmp_path / "plain", verify=False)
    with pytest.raises(ModelError, match=r"plain: no plan.yaml with cache entries"):
        lw.load_cache(tmp_path / "plain")


def test_pairs_in_words():
    assert parse_pair("K8V4") == (8, 4)
    assert parse_pair(" k16v2 ") == (16, 2)
    for bad in ("8", "K3V4", "K8", "K8V4x", "V4K8"):
        with pytest.raises(ConfigError, match=r"write the bits of keys and values such as K8V4; each is 2, 4, 8 or 16"):
            parse_pair(bad)


def test_true_bits_count_scales_and_offsets():
    """Two numbers of 16 bits a group: a quarter of a bit at 128 channels, a bit at groups of 32."""
    assert true_bits([(8, 4)], Scheme(), 128) == 6.25
    assert true_bits([(4, 2)], Scheme("kivi"), 128) == 4.0
    assert true_bits([(16, 16), (4, 4)], Scheme(), 64) == (16 + 4.5) / 2
    assert true_bits([(8, 2)], Scheme(group=32), 192, 64) == (192 * 9 + 64 * 3) / 256
    # the settings of the paper: 1 x KV8, 6 x KV4, 9 x KV2, 16 x K4V2 are 3.0625 bits before scales and offsets
    pairs = [(8, 8)] + [(4, 4)] * 6 + [(2, 2)] * 9 + [(4, 2)] * 16
    assert true_bits(pairs, Scheme("kivi"), 128) == 3.0625 + 1
