import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from layerwise.errors import DataError, ModelError
from layerwise.evaluate import accuracy, multiple_choice
from layerwise.evaluate.accuracy import answer_scores, choose
from layerwise.tasks import Batches, images


class Brightness(nn.Module):
    """Two classes, dark and bright."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([self.threshold - mean, mean - self.threshold], dim=1)


@pytest.fixture
def shades(tmp_path):
    pixels = np.array([0, 50, 100, 150, 200, 250], dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.array([0, 0, 0, 1, 1, 0]))
    return images(tmp_path / "d.npz", batch=4)


def test_accuracy_counts_examples_not_batches(shades):
    got = accuracy(Brightness().train(), shades)
    assert got.top1 == pytest.approx(5 / 6)  # batches of 4 and 2: 1.0 and 0.5, whose mean would be 0.75
    assert got.examples == 6
    assert got.agreement is None
    assert got.protocol["hash"] == shades.hash
    assert accuracy(Brightness(0.9), shades, against=Brightness()).agreement == pytest.approx(4 / 6)


def test_accuracy_needs_labels_and_a_classifier(shades):
    with pytest.raises(DataError, match="no labels"):
        accuracy(Brightness(), Batches(({"x": torch.ones(1, 1, 2, 2)},), {}))
    with pytest.raises(ModelError, match="needs a classifier"):
        accuracy(nn.Flatten(0), shades)


def test_acc_and_acc_norm_differ():
    # -6 against -7, but -3.0 against -0.7778 per character
    assert choose([-6.0, -7.0], ["no", "yes it is"]) == (0, 1)
    assert choose([-1.0, -1.0], ["a", "b"]) == (0, 0)


class Words(nn.Module):
    """The next word follows the last one by a fixed table of log-probabilities."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids):
        return self.table[input_ids]


@pytest.fixture
def words():
    vocabulary = {word: index for index, word in enumerate("Question: how Answer: no yes it is [UNK]".split())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")  # noqa: S106


def test_answers_are_scored_after_the_prompt(words):
    probabilities = torch.full((8, 8), 1 / 8)
    probabilities[2] = torch.tensor([0, 0, 0, 0.5, 0.25, 0.25, 0, 0]) + 1e-9  # Answer: -> no .5, yes .25
    probabilities[4] = torch.tensor([0, 0, 0, 0, 0, 0.8, 0.2, 0]) + 1e-9  # yes -> it .8
    probabilities[5] = torch.tensor([0, 0, 0, 0, 0, 0, 0.5, 0.5]) + 1e-9  # it -> is .5
    model = Words(probabilities.log())
    scores = answer_scores(model, words, "Question: how\nAnswer:", [" no", " yes it is"])
    assert scores == pytest.approx([math.log(0.5), math.log(0.25 * 0.8 * 0.5)], abs=1e-5)


def test_multiple_choice_file(tmp_path, words):
    table = torch.zeros(8, 8)
    table[2, 3] = 0.3  # "no" a little likelier than any other first word; the rest uniform
    lines = [{"goal": "how", "sol1": "no", "sol2": "yes it is", "label": label} for label in (0, 1, 1)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    got = multiple_choice(Words(table), words, path)
    # log p: no -1.82 (2 characters: -0.91 each); yes it is -6.3 (9: -0.70 each)
    assert (got.acc, got.acc_norm) == pytest.approx((1 / 3, 2 / 3))
    assert got.choices == (0, 0, 0)
    assert got.protocol["items"] == 3
    assert multiple_choice(Words(table), words, path, limit=1).acc == 1


def test_the_tenth_answer_stands_after_the_second(tmp_path, words):
    table = torch.zeros(8, 8)
    table[2, 3] = 9.0  # "no" it is
    answers = {f"sol{number}": "no" if number == 10 else "yes" for number in range(1, 12)}
    (tmp_path / "d.jsonl").write_text(json.dumps({"goal": "how", **answers, "label": 9}))
    got = multiple_choice(Words(table), words, tmp_path / "d.jsonl")
    assert got.choices == (9,)
    assert got.acc == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no items"),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}', "item 1 needs"),
        ('{"goal": "g", "sol1": "a", "label": 0}', "1 answers and label 0"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}', "2 answers and label 2"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": true}', "label True"),
        ('{"goal": "g", "sol1": "a", "sol2": 3, "label": 0}', "item 1: `goal` and every `sol` must be text"),
        ('{"goal": "g", "sol1": "a", "sol2": "", "label": 0}', "item 1: `goal` and every `sol` must be text"),
        ('{"goal": "g", "sol1": "a", "sol3": "b", "label": 0}', r"answers \[1, 3\]. Number them"),
        ("nonsense", "item 1 needs"),
        ("7", "item 1 needs"),
    ],
)
def test_unusable_question_files(tmp_path, words, content, says):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        multiple_choice(Words(torch.zeros(8, 8)), words, tmp_path / "d.jsonl")
