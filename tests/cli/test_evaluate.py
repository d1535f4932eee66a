"""`layerwise evaluate`: the protocol beside the numbers, times, and tasks of lm-evaluation-harness."""

import json
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

import layerwise
from harness_kit import few_tasks
from layerwise.cli import main, screen
from layerwise.evaluate import harness
from tiny import tiny_llama, tiny_text

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_llama(folder / "model")
    tiny_llama(folder / "dense", seed=1)
    tiny_text(folder / "text.txt")
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{3 * i} w1"], "answer": i % 2} for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    return folder


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen, "SOON", 1e9)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return tmp_path


def as_json(capsys, *args):
    capsys.readouterr()
    assert main(["evaluate", *args, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys, *args):
    capsys.readouterr()
    assert main(["evaluate", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


TEXT = ["--data", "text.txt", "--tokens", "256"]


def test_the_protocol_is_complete(here, capsys):
    facts = as_json(capsys, "model", "--against", "dense", *TEXT)["protocol"]
    assert facts["model"] != facts["dense_model"]
    assert (facts["tokens"], facts["length"], facts["scored_tokens"]) == (256, 64, 4 * 63)
    known = {
        "tokenizer",
        "hash",
        "bos",
        "join",
        "dtype",
        "dense_dtype",
        "device",
        "torch",
        "transformers",
        "convention",
    }
    assert known <= set(facts)
    assert facts["bos"] == "as the tokenizer adds"
    capsys.readouterr()
    assert main(["evaluate", "model", "--against", "dense", *TEXT]) == 0
    shown = capsys.readouterr().out
    assert f"hashes: model {facts['model']}, dense {facts['dense_model']}, tokenizer {facts['tokenizer']}" in shown


def test_bos_in_every_window(here, capsys):
    assert "no BOS token" in refused(capsys, "model", *TEXT, "--bos-every-window")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.bos_token = "w7"  # noqa: S105
    tokenizer.save_pretrained("model")
    plain, with_bos = (as_json(capsys, "model", *TEXT, *more) for more in ([], ["--bos-every-window"]))
    assert (plain["protocol"]["bos"], with_bos["protocol"]["bos"]) == ("as the tokenizer adds", "every window")
    assert with_bos["protocol"]["first_ids"].split()[0] == str(tokenizer.bos_token_id)
    assert with_bos["perplexity"] != plain["perplexity"]
    capsys.readouterr()
    assert main(["evaluate", "model", *TEXT, "--bos-every-window"]) == 0
    assert "BOS in every window" in capsys.readouterr().out


def test_times_of_both_models(here, capsys, monkeypatch):
    quick = layerwise.evaluate.latency
    monkeypatch.setattr(layerwise.evaluate, "latency", lambda model, **more: quick(model, seconds=0.01, **more))
    found = as_json(capsys, "model", "--against", "dense", *TEXT, "--latency")["latency"]
    assert set(found) == {"model", "dense"}
    config = layerwise.load("model").config
    head = config.hidden_size // config.num_attention_heads
    assert found["model"]["kv_bytes"] == 2 * 3 * config.num_key_value_heads * head * 64 * 4  # 3 blocks, 64 tokens
    assert found["model"]["prefill_ms"] > 0
    assert found["model"]["decode_iqr"] >= 0
    capsys.readouterr()
    assert main(["evaluate", "model", *TEXT, "--latency"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"prefill ms +ms/token +KV bytes", shown)
    assert "prefill and KV cache of 64 tokens, 32 tokens decoded after 32" in shown


def test_tasks_beside_the_dense_model(here, capfd):
    pytest.importorskip("lm_eval")
    found = as_json(capfd, "model", "--against", "dense", "--tasks", "first.yaml,second.yaml", "--batch", "4")
    same = harness(layerwise.load("model"), layerwise.load_tokenizer("model"), ["first.yaml"], batch=4, length=64)
    assert found["results"]["first"] == same.to_dict()["results"]["first"]
    assert found["protocol"]["model"] == same.protocol["model"]
    assert found["dense"]["protocol"]["model"] != found["protocol"]["model"]
    assert found["protocol"]["length"] == 64  # the model's own longest
    assert found["versions"] == {"first": "3", "second": "3"}
    change = found["differences"]["first"]["acc"]["value"]
    assert change == pytest.approx(
        found["results"]["first"]["acc"]["value"] - found["dense"]["results"]["first"]["acc"]["value"]
    )
    assert found["items"] == {"first": 12, "second": 12}


def test_tasks_for_people(here, capfd):
    pytest.importorskip("lm_eval")
    assert main(["evaluate", "model", "--against", "dense", "--tasks", "first.yaml, second.yaml", "--limit", "8"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    figure = r"\d\.\d{4} ± \d\.\d{4}"
    assert re.search(rf"^first +acc +{figure} +{figure} +[+-]{figure}$", out, re.MULTILINE)
    assert re.search(rf"^ +acc_norm +{figure} +{figure} +[+-]{figure}$", out, re.MULTILINE)
    assert re.search(rf"^mean of 2 +acc +{figure} +{figure} +[+-]{figure}$", out, re.MULTILINE)
    assert "lm-eval 0." in out
    assert "second: version 3, 0 examples in the prompt, 8 documents, hash " in out
    assert re.search(r"hashes: model \w{16}, dense \w{16}, tokenizer \w{16}", out)


def test_a_note_about_examples_is_said(here, capsys):
    pytest.importorskip("lm_eval")
    (here / "first.yaml").write_text(TASK.format(name="first") + "num_fewshot: 1\n")
    assert main(["evaluate", "model", "--tasks", "first.yaml", "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert "note: first: it has no split for examples" in err
    assert "1 examples in the prompt" in out


def test_requests_that_cannot_be_carried_out(here, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    few_tasks(monkeypatch)
    assert "arc_eazy: no such lm-eval task. Did you mean arc_easy?" in refused(capsys, "model", "--tasks", "arc_eazy")
    assert "third.yaml: no such task file" in refused(capsys, "model", "--tasks", "first.yaml,third.yaml")
    assert "at least one task" in refused(capsys, "model", "--tasks", ",")
    assert "arc_easy: the task's data cannot be had" in refused(capsys, "model", "--tasks", "arc_easy")
    (here / "first.yaml").write_text("task: [")
    assert "first.yaml: not a task that lm-eval can use" in refused(capsys, "model", "--tasks", "first.yaml")
    for option in (
        ["--data", "text.txt"],
        ["--tokens", "9"],
        ["--latency"],
        ["--bos-every-window"],
        ["--convention", "all"],
    ):
        assert f"{option[0]}: not used, since --tasks bring their own text" in refused(
            capsys, "model", "--tasks", "second.yaml", *option
        )
    assert "--limit goes with --tasks" in refused(capsys, "model", *TEXT, "--limit", "3")
    assert "longest input is 64" in refused(capsys, "model", "--tasks", "second.yaml", "--length", "65")


def test_without_lm_eval_the_extra_is_named(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    err = refused(capsys, "model", "--tasks", "first.yaml")
    assert err == "layerwise: harness needs lm-evaluation-harness: pip install 'layerwise[eval]'.\n"


def test_logits_that_are_not_numbers_end_the_run(here, capsys):
    pytest.importorskip("lm_eval")
    model = layerwise.load("model")
    with torch.no_grad():  # finite weights whose products are not
        for name in ("up_proj", "gate_proj"):
            getattr(model.model.layers[0].mlp, name).weight.fill_(1e30)
    model.save_pretrained("model")
    capsys.readouterr()
    assert main(["evaluate", "model", "--tasks", "first.yaml"]) == 1
    assert "first: the logits are not finite numbers" in capsys.readouterr().err
