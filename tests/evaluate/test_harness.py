"""lm-evaluation-harness on a model in memory: what it gives, and what it leaves as it was."""

import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from harness_kit import QUESTIONS, ROWS, arc_rows, as_dict, byte_tokenizer, packaged, rows_of, sharp, syllables
from layerwise.errors import ConfigError, MissingExtra, ModelError, ScoreError
from layerwise.evaluate import differences, find_tasks, harness
from layerwise.evaluate.accuracy import answer_scores, choose
from models import small_llama


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return sharp(0)


@pytest.fixture(scope="module")
def run():
    """One result that several tests look at: (result, tasks, what progress was told)."""
    pytest.importorskip("lm_eval")
    tasks, told = find_tasks([QUESTIONS]), []
    told_of = lambda done, total: told.append((done, total))  # noqa: E731
    return harness(sharp(0), byte_tokenizer(), tasks, length=256, batch=8, progress=told_of), tasks, told


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def test_without_lm_eval_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[eval\]'"):
        harness(model, tokenizer, [QUESTIONS])


def test_a_head_of_its_own_under_a_tied_configuration_is_refused(model, tokenizer):
    pytest.importorskip("lm_eval")
    harness(model, tokenizer, [QUESTIONS], limit=1)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 0.5)
    with pytest.raises(ModelError, match="tie_word_embeddings = False"):
        harness(model, tokenizer, [QUESTIONS], limit=1)
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight.detach().clone()
    harness(model, tokenizer, [QUESTIONS], limit=1)
    assert torch.equal(model.lm_head.weight, head)


def test_everything_is_left_as_it_was(model, tokenizer, capsys):
    pytest.importorskip("lm_eval")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    harness(model, tokenizer, [QUESTIONS], length=256, batch=8, device="cpu")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token is None  # the harness gives its own copy one
    assert capsys.readouterr() == ("", "")  # nor do its bars and remarks show


def test_what_a_result_says(run):
    got, _, told = run
    figures = got.results["stdlib_modules"]
    assert set(figures) == {"acc", "acc_norm"} == set(got.mean)
    assert figures["acc"] == got.mean["acc"]
    assert figures["acc"].value == sum(got.scores["stdlib_modules"]["acc"]) / 40
    p = figures["acc"].value
    assert 0 < p < 1
    assert figures["acc"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 39))
    assert (got.versions, got.shots, got.items) == tuple({"stdlib_modules": one} for one in ("1", 0, 40))
    assert got.notes == ()
    assert [len(row) for row in got.log_likelihoods["stdlib_modules"]] == [4] * 40
    assert told == [(done, 160) for done in range(1, 161)]
    expected = {"limit": "none", "length": 256, "batch": 8, "dtype": "float32", "chat_template": False}
    assert expected.items() <= got.protocol.items()
    assert got.protocol["lm_eval"].startswith("0.4")
    assert got.protocol["seeds"] == "random 0, numpy 1234, torch 1234, fewshot 1234"
    json.dumps(got.to_dict())


def test_the_first_few_documents(run, model, tokenizer):
    five = harness(model, tokenizer, run[1], limit=5)
    assert five.items == {"stdlib_modules": 5}
    assert five.protocol["limit"] == 5
    rows = run[0].log_likelihoods["stdlib_modules"][:5]
    for row, same in zip(five.log_likelihoods["stdlib_modules"], rows, strict=True):
        assert row == pytest.approx(same, abs=1e-3)  # the same in windows of 2048, and one by one
    with pytest.raises(ConfigError, match="different documents"):
        differences(five, run[0])


def test_three_ways_to_give_the_same_questions(run, model, tokenizer, tmp_path):
    """A definition that reads a file, one that makes its data, and a file that keeps the prompts of a task of the harness."""
    pytest.importorskip("lm_eval")
    import datasets

    made = as_dict("made", custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(ROWS)})
    got = harness(
        model,
        tokenizer,
        [as_dict("read"), made, packaged(tmp_path, "arc_easy", **arc_rows(tmp_path))],
        length=256,
        batch=8,
    )
    assert list(got.results) == ["read", "made", "local_arc_easy"]
    assert got.results["read"] == got.results["made"] == got.results["local_arc_easy"]
    acc, mean = got.results["read"]["acc"], got.mean["acc"]
    assert (mean.value, mean.stderr) == pytest.approx((acc.value, acc.stderr / math.sqrt(3)))
    assert got.log_likelihoods["read"] == got.log_likelihoods["made"] == got.log_likelihoods["local_arc_easy"]
    assert got.versions["local_arc_easy"] == "1.0"
    assert got.results["read"] == run[0].results["stdlib_modules"]


def test_our_scores_are_the_harness_scores(run, model, tokenizer):
    right = [0, 0]
    with torch.no_grad():
        for one in ROWS:
            prompt, answers = f"Question: {one['question']}\nAnswer:", one["choices"]
            scores = answer_scores(model.eval(), tokenizer, prompt, [f" {answer}" for answer in answers])
            right = [
                count + (choice == one["answer"]) for count, choice in zip(right, choose(scores, answers), strict=True)
            ]
    got = run[0].results["stdlib_modules"]
    assert (got["acc"].value, got["acc_norm"].value) == pytest.approx((right[0] / 40, right[1] / 40))


def test_a_bfloat16_model_is_scored_in_float32(tokenizer):
    pytest.importorskip("lm_eval")
    model = sharp().bfloat16()
    got = harness(model, tokenizer, [QUESTIONS], limit=6)
    assert got.protocol["softmax"] == "float32"
    with torch.no_grad():
        for one, row in zip(ROWS[:6], got.log_likelihoods["stdlib_modules"], strict=True):
            answers = [f" {answer}" for answer in one["choices"]]
            # one by one, as the harness does: padding changes kernels, and so the last bits of bfloat16
            expected = [
                answer_scores(model, tokenizer, f"Question: {one['question']}\nAnswer:", [a])[0] for a in answers
            ]
            assert row == pytest.approx(expected, abs=1e-3)
            assert row != pytest.approx(torch.tensor(row).bfloat16().tolist(), abs=1e-3)


@pytest.mark.parametrize("length", [8, 256])
def test_a_uniform_model_has_50_to_the_tokens_per_byte(tmp_path, length):
    pytest.importorskip("lm_eval")
    model = small_llama(vocab_size=50, max_position_embeddings=256)
    nn.init.zeros_(model.lm_head.weight)
    tokenizer = syllables()
    pages = ["one two two one" * 3, "two", "one one two " * 9]
    rows = rows_of(tmp_path / "pages.jsonl", [{"page": page} for page in pages])
    file = packaged(tmp_path, "wikitext", **rows)
    found = harness(model, tokenizer, [file], length=length, batch=2)
    got = found.results["local_wikitext"]
    assert found.notes == ()  # that the harness's own file leaves defaults out is no news
    read = sum(len(tokenizer(page)["input_ids"]) for page in pages)
    given = sum(len(page.encode()) for page in pages)
    assert read != given
    assert got["byte_perplexity"].value == pytest.approx(50 ** (read / given), rel=1e-5)
    assert got["bits_per_byte"].value == pytest.approx(read / given * math.log2(50), rel=1e-5)
    words = sum(len(page.split(" ")) for page in pages)
    assert got["word_perplexity"].value == pytest.approx(50 ** (read / words), rel=1e-5)


def test_differences_are_paired(run, tokenizer):
    dense, tasks, _ = run
    found = harness(sharp(1), tokenizer, tasks, length=256, batch=8)
    got = differences(found, dense)["stdlib_modules"]["acc"]
    steps = [a - b for a, b in zip(found.scores["stdlib_modules"]["acc"], dense.scores["stdlib_modules"]["acc"])]
    assert any(steps)
    assert got.value == pytest.approx(sum(steps) / 40)
    assert got.stderr == pytest.approx(np.std(steps, ddof=1) / math.sqrt(40))
    again = harness(sharp(0), tokenizer, tasks, length=256, batch=8)
    assert again == dense  # tasks can be run again, on another model in between


def test_prompts_that_were_cut_are_one_note(run, tokenizer):
    got = harness(sharp(), tokenizer, run[1], limit=3, length=24)
    (note,) = got.notes
    assert re.search(r"exceeds model's maximum length \(24\).* \(\d+ more like this\)$", note)


def test_a_check_of_lm_evals_that_has_nothing_to_do_with_lengths_is_not_blamed_on_them(model, tokenizer, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")

    def refuse(**given):
        raise AssertionError("two documents at least")  # pytest would add to the words of an assert

    monkeypatch.setattr(lm_eval, "evaluate", refuse)
    words = r"lm-eval refuses \(two documents at least; test_harness\.py, line \d+: raise .*\)"
    with pytest.raises(ConfigError, match=words) as found:
        harness(model, tokenizer, [QUESTIONS], limit=1)
    assert "length" not in str(found.value)


def test_bad_requests(model, tokenizer):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="limit=0"):
        harness(model, tokenizer, [QUESTIONS], limit=0)
    with pytest.raises(ConfigError, match="length=1 an answer does not fit"):
        harness(model, tokenizer, [QUESTIONS], limit=1, length=1)
    with pytest.raises(ModelError, match="no language model of transformers"):
        harness(nn.Linear(2, 2), tokenizer, [QUESTIONS])
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ScoreError, match="stdlib_modules: the logits are not finite"):
        harness(model, tokenizer, [QUESTIONS], limit=2)
