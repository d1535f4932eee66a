import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from layerwise.errors import ConfigError, MissingExtra, ModelError
from layerwise.evaluate import harness
from layerwise.evaluate.harness import _refuse_untied_head
from models import small_llama

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(token_models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # noqa: S106


@pytest.fixture
def model():
    return small_llama(vocab_size=257, max_position_embeddings=256, tie_word_embeddings=True)


def test_without_lm_eval_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[eval\]'"):
        harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE)


def test_a_head_of_its_own_under_a_tied_configuration_is_refused(model):
    _refuse_untied_head(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 0.5)
    with pytest.raises(ModelError, match="tie_word_embeddings = False"):
        _refuse_untied_head(model)
    model.config.tie_word_embeddings = False
    _refuse_untied_head(model)


def test_local_task_offline(model, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "HF_DATASETS_OFFLINE", "1")
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    got = harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE, length=256, batch=8)
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert 0 <= got.results["stdlib_modules"]["acc"] <= 1
    assert set(got.results["stdlib_modules"]) == {"acc", "acc_norm"} == set(got.mean)
    assert got.items == {"stdlib_modules": 40}
    assert got.versions == {"stdlib_modules": "1"}
    assert got.protocol["shots"] == 0
    assert harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE, limit=5).items == {"stdlib_modules": 5}


def test_a_task_given_as_a_dict_agrees_with_its_file(model, tokenizer):
    pytest.importorskip("lm_eval")
    task = {
        "task": "same_questions", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(EXAMPLE / "stdlib_modules.jsonl")}},
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    by_file = harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE)
    by_dict = harness(model, tokenizer, [task])
    assert by_file.results["stdlib_modules"] == by_dict.results["same_questions"]


def test_our_scores_are_the_harness_scores(model, tokenizer):
    pytest.importorskip("lm_eval")
    import json

    from layerwise.evaluate.accuracy import answer_scores, choose

    questions = [json.loads(line) for line in (EXAMPLE / "stdlib_modules.jsonl").read_text().splitlines()]
    right = [0, 0]
    with torch.no_grad():
        for one in questions:
            prompt, answers = f"Question: {one['question']}\nAnswer:", one["choices"]
            chosen = choose(
                answer_scores(model.eval(), tokenizer, prompt, [f" {answer}" for answer in answers]), answers
            )
            right = [count + (choice == one["answer"]) for count, choice in zip(right, chosen, strict=True)]
    got = harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE).results["stdlib_modules"]
    assert (got["acc"], got["acc_norm"]) == pytest.approx((right[0] / 40, right[1] / 40))


@pytest.mark.slow  # indexes all tasks of the harness
def test_unknown_tasks_and_folders(model, tokenizer):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match=r"stdlib_module: no such lm-eval task\. Did you mean stdlib_modules"):
        harness(model, tokenizer, ["stdlib_module"], include_path=EXAMPLE)
    with pytest.raises(ConfigError, match="no such folder"):
        harness(model, tokenizer, ["stdlib_modules"], include_path=EXAMPLE / "nothing")
