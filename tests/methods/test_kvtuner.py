"""KVTuner from data to plan: bits within the cap, never behind a uniform pair, sliding windows, resuming, what is refused."""

import copy
import dataclasses

import pytest
import torch

from caches import tiny
from layerwise.cache import QuantizedKVCache
from layerwise.errors import BudgetError, ConfigError, DataError, ModelError, ShapeError
from layerwise.methods import METHODS, KVTuner, method_from
from layerwise.methods.kv_expected import Expected
from layerwise.methods.kv_layers import layers_of, measured_errors, space_of, starts_of
from layerwise.methods.kv_space import Space
from layerwise.methods.kv_verdict import TriedBits, front_of, verdict_on
from layerwise.plan import Plan
from layerwise.randomness import generator_for
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for, small_llama

LAYERS = 4
SMALL = {"trials": 30, "judged": 48, "bits": 7.0}  # heads of 8 channels: scales take 4 bits a number


@pytest.fixture(scope="module")
def model():
    return small_llama(num_hidden_layers=LAYERS, initializer_range=0.3)


def data(count=4, tokens=24):
    ids = [torch.randint(3, 60, (1, tokens), generator=generator_for(index, "ids")) for index in range(count)]
    return Batches(tuple({"input_ids": one} for one in ids), {})


@pytest.fixture(scope="module")
def found(model):
    return KVTuner(**SMALL).search(model, data())


def test_the_plan_holds_bits_for_every_attention_within_the_cap(model, found):
    plan = found.plan
    assert list(plan.layers) == [f"model.layers.{index}.self_attn" for index in range(LAYERS)]
    pairs = [(one.cache.key_bits, one.cache.value_bits) for one in plan.layers.values()]
    assert sum(map(sum, pairs)) / 2 / LAYERS + 4 <= 7.0
    structure = structure_of(model)
    plan.check(structure.layers, blocks=[one.name for one in structure.blocks], fingerprint=structure.fingerprint)
    assert QuantizedKVCache.from_plan(plan, model.config).pairs == tuple(pairs)
    assert plan.method["name"] == "kvtuner"
    assert found.verdict in plan.notes
    assert all(score >= 0 for score in plan.scores.values())


def test_nothing_tried_is_above_the_cap_but_uniform_pairs(found):
    assert all(one.bits <= 7.0 or one.uniform for one in found.tried)
    assert sum(one.uniform for one in found.tried) == 9
    assert [one.bits for one in found.front] == sorted(one.bits for one in found.front)
    assert all(one.true == one.bits == one.nominal + 4 for one in found.tried)


def test_it_is_never_behind_a_uniform_pair_of_as_many_bits(found):
    held = [one for one in found.tried if one.unseen is not None]
    pairs = tuple((one.cache.key_bits, one.cache.value_bits) for one in found.plan.layers.values())
    chosen = next(one for one in found.tried if one.pairs == pairs)
    uniform = [one for one in held if one.uniform]
    assert {one.bits for one in uniform} == {6.0, 7.0}  # K2V2, K4V2 and K2V4
    assert all(chosen.unseen <= one.unseen for one in uniform)


def test_a_second_run_gives_the_same_plan_and_the_model_is_untouched(found):
    model = small_llama(num_hidden_layers=LAYERS, initializer_range=0.3).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert KVTuner(**SMALL).plan(model, data()).to_yaml() == found.plan.to_yaml()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plan_survives_save_and_load(found, tmp_path):
    found.plan.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == found.plan
    settings = dict(loaded.method)
    assert method_from(settings.pop("name"), **settings) == KVTuner(**SMALL)


def test_a_search_goes_on_from_its_storage_and_more_trials_go_on_from_fewer(model, found, tmp_path):
    measured = []

    def metric(model, new, batches):
        measured.append(new().pairs)
        return torch.tensor([float(sum(map(sum, new().pairs)))] * 8) ** -1.0

    fewer, more = (KVTuner(trials=trials, judged=48, bits=8.0) for trials in (14, 20))
    first = fewer.search(model, data(), storage=tmp_path / "search.json", metric=metric)
    assert len(measured) == 14 + sum(one.unseen is not None for one in first.tried)
    measured.clear()
    second = more.search(model, data(), storage=tmp_path / "search.json", metric=metric)
    assert len(measured) == 6 + sum(one.unseen is not None for one in second.tried)
    assert second.tried == more.search(model, data(), metric=metric).tried  # as if it had never stopped


def test_a_metric_of_the_users_own_decides(model):
    """The bits of the last attention alone matter."""

    def metric(model, new, batches):
        return 1 / torch.full((6,), float(sum(new().pairs[-1])))

    search = KVTuner(**{**SMALL, "bits": 8.0}, eps=0.0).search(model, data(), metric=metric)
    last = search.plan.layers[f"model.layers.{LAYERS - 1}.self_attn"].cache
    assert (last.key_bits, last.value_bits) == (8, 8)
    assert "loss on data the search did not see 0.0625" in search.verdict


def test_without_a_better_choice_the_best_uniform_pair_is_returned_and_said(model):
    def metric(model, new, batches):  # noise: every choice but the uniform ones is worse
        return torch.arange(8.0) + (len(set(new().pairs)) > 1)

    search = KVTuner(**SMALL).search(model, data(), metric=metric)
    assert {(one.cache.key_bits, one.cache.value_bits) for one in search.plan.layers.values()} == {(2, 2)}
    assert search.verdict.startswith(
        "K2V2 for all: loss on data the search did not see 3.5 at 6 true bits (2 nominal), and none of"
    )


def test_sliding_windows_stay_full_and_do_not_count():
    model = MODELS["gemma3"]()
    batches = Batches(tuple(inputs_for("gemma3", model, seed=seed) for seed in range(2)), {})
    search = KVTuner(**{**SMALL, "trials": 12}).search(model, batches)
    assert list(search.plan.layers) == ["model.layers.1.self_attn"]
    assert "1 of 2 decoder layers keep no cache that grows" in " ".join(search.plan.notes)
    assert QuantizedKVCache.from_plan(search.plan, model.config).pairs[0] == (16, 16)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "gpt2", "gpt_neox", "llava"])
def test_other_models(name):
    model = MODELS[name]()
    batches = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(2)), {})
    plan = KVTuner(**{**SMALL, "trials": 10}).plan(model, batches)
    assert len(plan.layers) == model.config.get_text_config().num_hidden_layers


def test_a_cache_beside_a_state_is_decided_about():
    plan = KVTuner(**{**SMALL, "trials": 10}).plan(tiny("falcon_h1"), data(2))
    assert list(plan.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gptj", "GPTJForCausalLM: its attentions do not go through transformers' attention interface"),
        ("codegen", "CodeGenForCausalLM: its attentions do not go through transformers' attention interface"),
        ("xglm", "XGLMForCausalLM: its attentions do not go through transformers' attention interface"),
        ("doge", "DogeAttention has attention functions of its own, with masks that depend on cached values"),
        ("zamba", "ZambaForCausalLM: layers 1, 2 have no attention of their own"),
        ("minimax", "minimax has a cache of its own kind"),
    ],
)
def test_attentions_that_cannot_be_looked_at_are_refused_with_the_reason(kind, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        KVTuner(**SMALL).plan(tiny(kind), data(2))
    assert "\n" not in str(caught.value)


def test_kivi_groups_tokens_of_a_channel_and_says_what_stays(model):
    tuner = KVTuner(**{**SMALL, "bits": 9.0}, mode="kivi", group=8, residual=8)
    plan = tuner.plan(model, data())
    assert {(one.cache.mode, one.cache.group, one.cache.residual) for one in plan.layers.values()} == {("kivi", 8, 8)}
    assert "full precision (8)" in plan.notes[0]
    assert QuantizedKVCache.from_plan(plan, model.config).scheme.mode == "kivi"
    layers = layers_of(model, data()[0], tuner.treatment((2, 2)), False)
    x = torch.randn(1, 2, 19, 8, generator=generator_for(0, "x"))
    keys, values = (layers.quantise(x, 2, which) for which in ("key", "value"))
    for made in (keys, values):
        assert torch.equal(made[:, :, 16:], x[:, :, 16:])  # no whole group
        assert not torch.equal(made[:, :, :16], x[:, :, :16])
    assert all(len(keys[0, 0, :8, channel].unique()) <= 4 for channel in range(8))
    assert all(len(values[0, 0, token].unique()) <= 4 for token in range(16))


def test_exact_prefill_runs_and_finds_less_loss(model, found):
    exact = KVTuner(**SMALL, prefill="exact").search(model, data())
    of_search = {one.pairs: one.loss for one in found.tried}
    assert exact.tried[0].loss < of_search[exact.tried[0].pairs]


def test_true_bits_are_the_cap_unless_nominal(model):
    with pytest.raises(
        BudgetError, match=r"4 bits for each cached number: 6 to 12 are feasible with levels 2,4,8 in mode per-token"
    ):
        KVTuner(bits=4.0).plan(model, data())
    search = KVTuner(**{**SMALL, "bits": 4.0, "trials": 12}, nominal=True).search(model, data())
    assert all(one.bits == one.nominal == one.true - 4 for one in search.tried)
    assert all(one.nominal <= 4 or one.uniform for one in search.tried)


def test_levels_may_hold_full_precision(model):
    search = KVTuner(**{**SMALL, "bits": 20.0, "trials": 12}, levels="4,16").search(model, data())
    assert {bits for one in search.tried for pair in one.pairs for bits in pair} == {4, 16}
    assert max(one.true for one in search.tried) == 16


def test_starts_are_the_best_sums_within_the_cap(model):
    layers = layers_of(model, data()[0], KVTuner().treatment((2, 2)), False)
    errors = measured_errors(model, data(), layers, (2, 4, 8))
    space = space_of(errors, layers, 0.05, 2, "own")
    starts = starts_of(space, errors, layers, 7.0)

    def total(pairs):
        return sum(errors[name][pair] for name, pair in zip(layers.names, pairs))

    assert len(set(starts)) == len(starts) > 2
    assert all(layers.bits(pairs) <= 7 for pairs in starts)
    inside = [space.pairs(chosen) for chosen in every(space)]
    assert total(starts[0]) == pytest.approx(min(total(pairs) for pairs in inside if layers.bits(pairs) <= 7))


def every(space):
    from itertools import product

    return product(*space.options)


def test_what_is_expected_is_exact_where_losses_add_up():
    options = ((2, 2), (4, 2), (8, 8))
    space = Space(((0,), (1,), (2,)), (options,) * 3)

    def bits(pairs):
        return sum(map(sum, pairs)) / 6

    def loss(pairs):
        return sum(weight / sum(pair) for weight, pair in zip((1.0, 5.0, 2.0), pairs))

    expected, known, seen = Expected(space, bits, 5.0), {}, []
    assert expected.best(known) is None  # nothing is known yet
    known[((2, 2),) * 3] = loss(((2, 2),) * 3)
    for _ in range(12):
        if (pairs := expected.best(known)) is None:
            break
        assert pairs not in known
        assert bits(pairs) <= 5
        seen.append(pairs)
        known[pairs] = loss(pairs)
    best = min((space.pairs(one) for one in every(space) if bits(one) <= 5), key=loss)
    assert best in seen


def test_a_choice_in_words():
    one = TriedBits(((2, 2), (8, 4), (2, 2)), 1, 1, 1, 0.5, False)
    assert one.word == "1×K8V4 2×K2V2"
    assert dataclasses.replace(one, pairs=((8, 4),) * 3, uniform=True).word == "K8V4"


def test_the_verdict_takes_what_is_best_on_unseen_data_not_on_what_was_searched():
    def tried(pair, bits, loss, uniform=False):
        return TriedBits((pair, pair if uniform else (2, 2)), bits, bits, bits, loss, uniform)

    some = [tried((2, 2), 2, 9.0, True), tried((4, 4), 4, 3.0, True), tried((8, 4), 4, 1.0), tried((4, 2), 3, 2.0)]
    unseen = {some[0].pairs: 9.0, some[1].pairs: 3.0, some[2].pairs: 2.5, some[3].pairs: 1.0}
    verdict = verdict_on(some, 4.0, lambda pairs: torch.full((8,), unseen[pairs]))
    assert verdict.pairs == some[3].pairs
    assert [one.bits for one in front_of(some)] == [2, 3, 4]
    assert "1 at 3 true bits (3 nominal), beside K4V4's 3 at 4" in verdict.sentence
    low = verdict_on(some, 3.0, lambda pairs: torch.full((8,), unseen[pairs]))
    assert low.pairs == some[3].pairs
    assert "K2V2's 9" in low.sentence  # K4V4 is above the cap


@pytest.mark.parametrize(("gain", "counts"), [(2.1, False), (2.3, True)])  # of 16 rows: 2.18
def test_less_than_two_sure_standard_errors_do_not_count(gain, counts):
    noise = torch.tensor([1.0, -1.0] * 8)  # its standard error is 1 / sqrt(15)
    some = [TriedBits(((4, 4),) * 2, 4, 4, 4, 2.0, True), TriedBits(((8, 4), (2, 2)), 4, 4, 4, 1.0, False)]
    rows = {some[0].pairs: torch.full((16,), 5.0), some[1].pairs: 5.0 - gain / 15**0.5 + noise}
    verdict = verdict_on(some, 4.0, lambda pairs: rows[pairs])
    assert (verdict.pairs == some[1].pairs) == counts
    assert ("K4V4 for all" in verdict.sentence) != counts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": "2,3"}, "some of 2,4,8,16"),
        ({"levels": "2,2"}, "each once"),
        ({"levels": ""}, "some of 2,4,8,16"),
        ({"bits": 0.0}, "most bits"),
        ({"bits": float("nan")}, "most bits"),
        ({"mode": "per-channel"}, "give per-token or kivi"),
        ({"prefill": "both"}, "quantized or exact"),
        ({"noise": "pool"}, "own or reference"),
        ({"trials": 0}, "1 or more"),
        ({"group": -1}, "group >= 0"),
        ({"mode": "kivi", "residual": 8}, "until their group of 32 is whole"),
        ({"minutes": -1.0}, "0 or more"),
        ({"eps": float("nan")}, "0 or more"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        method_from("kvtuner", **settings)
    assert "\n" not in str(caught.value)


def test_settings_are_flat_plain_values():
    assert METHODS["kvtuner"] is KVTuner
    assert "\n" not in KVTuner.summary
    for value in dataclasses.asdict(KVTuner()).values():
        assert type(value) in (int, float, str, bool)


def test_what_it_cannot_work_on_is_refused(model):
    for some in (None, Batches((), {}), data(1)):
        with pytest.raises(DataError, match="needs calibration data"):
            KVTuner(**SMALL).plan(model, some)
    with pytest.raises(ShapeError, match="heads of 8 channels do not split into groups of 5"):
        KVTuner(**SMALL, group=5).plan(model, data())
    for name, message in {
        "t5": "has an encoder",
        "cifar_resnet": "is no transformers model",
        "mistral": "grows with the text",
    }.items():
        other = MODELS[name]()
        with pytest.raises(ModelError, match=message):
            KVTuner(**SMALL).plan(other, Batches(tuple(inputs_for(name, other, seed=seed) for seed in range(2)), {}))
