"""`layerwise evaluate` with a quantised KV cache: by bits, by a plan, by the plan in the model's folder."""

import json

import pytest

import layerwise as lw
from caches import tiny
from layerwise.cli import kv_cache, main
from layerwise.cli.inputs import ModelChoice
from layerwise.cli.screen import Screen
from layerwise.plan import CacheBits, Plan

TEXT = ("--data", "text.txt", "--tokens", "256", "--dtype", "float32")


def as_json(capsys, *args):
    assert main(["evaluate", *args, *TEXT, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def plan(*pairs):
    return Plan(
        layers={
            f"model.layers.{index}.self_attn": CacheBits(key_bits=keys, value_bits=values)
            for index, (keys, values) in enumerate(pairs)
        }
    )


def test_a_row_with_its_bits(here, capsys):
    assert main(["evaluate", "model", "--kv-bits", "K4V2", *TEXT]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    # 3 layers with one head of 16: 2 x 48 numbers of 16 bits; two 16-bit numbers for each 16 are 2 bits more
    assert "KV bits KV bytes/token" in shown
    assert "16 192" in shown
    assert "with K4V2 per-token" in shown
    assert "5.00 60" in shown
    assert "KL from the same model with the plain cache" in shown


def test_the_numbers_are_those_of_the_library(here, capsys):
    got = as_json(capsys, "model", "--against", "model", "--kv-bits", "K2V2", "--kv-mode", "kivi", "--kv-group", "16")
    kv = got["kv_cache"]
    model, tokenizer = lw.load("model", dtype="float32"), lw.load_tokenizer("model")
    cache = lw.QuantizedKVCache.uniform(2, 2, model.config, mode="kivi", group=16, quantize_prefill=True)
    want = lw.evaluate(model, lw.held_out("text.txt", tokenizer, length=64, tokens=256), against=model, cache=cache)
    assert kv["perplexity"] == pytest.approx(want.perplexity, rel=1e-6)
    assert kv["kl"] == pytest.approx(want.kl, rel=1e-4)
    assert kv["kl"] > 0
    assert kv["cache"]["bits"] == 4
    assert kv["protocol"]["kv_cache"] == "K2V2 kivi, group 16"
    assert got["kl"] < 1e-9
    assert as_json(capsys, "model")["kv_cache"] is None


def test_the_bits_of_a_plan_and_of_the_saved_folder(here, capsys):
    plan((8, 8), (2, 2)).save("kv.yaml")
    by_plan = as_json(capsys, "model", "--plan", "kv.yaml")["kv_cache"]
    assert by_plan["cache"]["bits"] == pytest.approx((8 + 2 + 2 * 2 + 16) / 3)
    lw.save(lw.load("model"), "out", tokenizer=lw.load_tokenizer("model"), plan=plan((8, 8), (2, 2)), verify=False)
    assert as_json(capsys, "out")["kv_cache"]["kl"] == by_plan["kl"]
    other = as_json(capsys, "out", "--kv-bits", "K16V16")["kv_cache"]
    assert other["cache"]["bits"] == 16  # what is asked for goes before what is saved


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--kv-bits", "K3V4"], '"K3V4": write the bits of keys and values such as K8V4; each is 2, 4, 8 or 16.'),
        (["--kv-bits", "K4V4", "--kv-mode", "kivi"], "layer 0: heads of 16 channels do not split into groups of 32 (values, mode kivi)"),
        (["--kv-bits", "K4V4", "--kv-mode", "kiwi"], 'mode="kiwi": give "per-token" or "kivi".'),
        (["--kv-group", "8"], "--kv-group: not used, since they go with --kv-bits. Leave it out."),
        (["--kv-bits", "K4V4", "--plan", "kv.yaml"], "--kv-bits and --plan both give the bits of the KV cache."),
        (["--plan", "far.yaml"], "this is none's attention"),
        (["--plan", "none.yaml"], "cannot read the plan"),
        (["--tasks", "x", "--kv-bits", "K4V4"], "--kv-bits: not used, since --tasks bring their own text."),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(here, capsys, args, line):
    plan((8, 8)).save("kv.yaml")
    plan((8, 8), (8, 8), (8, 8), (8, 8)).save("far.yaml")
    text = () if "--tasks" in args else TEXT
    assert main(["evaluate", "model", *args, *text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert len(err.splitlines()) == 1


def test_a_model_with_a_cache_of_its_own_kind_is_one_line(here, capsys):
    tiny("minimax").save_pretrained("minimax")
    lw.load_tokenizer("model").save_pretrained("minimax")
    plan_it = [
        "plan",
        "minimax",
        "--method",
        "kvtuner",
        "--bits",
        "6",
        "--data",
        "text.txt",
        "--samples",
        "2",
        "--length",
        "46",
    ]
    for args in (["evaluate", "minimax", "--kv-bits", "K4V4", *TEXT], plan_it):
        capsys.readouterr()
        assert main([*args, "-q"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "minimax has a cache of its own kind (MiniMaxCache), for the states of its linear attention" in line


def test_tasks_say_that_they_run_with_the_plain_cache(here, capsys):
    lw.save(lw.load("model"), "out", plan=plan((8, 8)), verify=False)
    capsys.readouterr()
    kv_cache.say_unused(ModelChoice("out"), Screen())
    assert capsys.readouterr().err.startswith("note: tasks run with the plain KV cache")
    kv_cache.say_unused(ModelChoice("model"), Screen())
    assert capsys.readouterr().err == ""
