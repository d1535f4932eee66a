"""Accuracy: of an image classifier, and of a language model on questions with two or more answers.

A question's answer is the one whose tokens have the highest summed log-probability after the prompt (`acc`), or the highest per
character of the answer (`acc_norm`). The two differ by 4 to 20 points: a figure without its name says nothing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..tasks import undisturbed
from ..tasks.batches import Batches, call
from ..tasks.text import tokenizer_hash
from .logits import Progress, logits_of
from .protocol import Protocol, environment_of, protocol_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Accuracy:
    """top1: fraction of `examples` whose highest logit is the label, in [0, 1]. agreement: the same with the dense model's choice."""

    top1: float
    agreement: float | None
    examples: int
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class MultipleChoice:
    """acc, acc_norm: fractions of `items`, in [0, 1]. choices: the answer chosen for each item (by acc), for paired tests."""

    acc: float
    acc_norm: float
    items: int
    choices: tuple[int, ...]
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def accuracy(
    model: nn.Module,
    batches: Batches,
    *,
    against: nn.Module | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Accuracy:
    """Of a classifier on batches with `labels` (see `tasks.images`); evaluated where it is, or on `device`.

    Raises DataError without labels, ModelError for other outputs."""
    right = agree = examples = 0
    with undisturbed([model] if against is None else [model, against], device):
        for done, batch in enumerate(batches, start=1):
            if "labels" not in batch:
                raise DataError(
                    f"{batches.protocol.get('source', 'the data')}: no labels. Put the images of each class in a subfolder."
                )
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            chosen = _classes(model, inputs, len(batch["labels"]))
            right += int((chosen == batch["labels"].cpu()).sum())
            if against is not None:
                agree += int((chosen == _classes(against, inputs, len(chosen))).sum())
            examples += len(chosen)
            if progress is not None:
                progress(done, len(batches))
    if not examples:
        raise DataError("accuracy needs at least one image.")
    return Accuracy(
        right / examples, None if against is None else agree / examples, examples, protocol_of(model, batches)
    )


def _classes(model: nn.Module, inputs: dict[str, Tensor], examples: int) -> Tensor:
    output = call(model, inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != examples:
        raise ModelError(f"{type(model).__name__} gives no logits (examples, classes): accuracy needs a classifier.")
    return logits.float().argmax(-1).cpu()


def multiple_choice(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> MultipleChoice:
    """Questions as in PIQA: a JSON object per line with `goal`, `sol1`, `sol2` and more if there are any, `label` (0 is `sol1`).

    The prompt is "Question: GOAL\\nAnswer:", an answer " SOL". `limit`: the first so many. Zero-shot, no chat template.
    """
    items = _read(Path(path), limit)
    chosen: list[int] = []
    by_character: list[int] = []
    with undisturbed([model]):
        for done, (goal, answers, _) in enumerate(items, start=1):
            scores = answer_scores(model, tokenizer, f"Question: {goal}\nAnswer:", [f" {answer}" for answer in answers])
            pick, normalised = choose(scores, answers)
            chosen.append(pick)
            by_character.append(normalised)
            if progress is not None:
                progress(done, len(items))
    labels = [label for _, _, label in items]
    protocol = environment_of(model) | {"source": str(path), "shots": 0, "prompt": "Question: GOAL\\nAnswer: SOL"}
    return MultipleChoice(
        acc=sum(map(int.__eq__, chosen, labels)) / len(items),
        acc_norm=sum(map(int.__eq__, by_character, labels)) / len(items),
        items=len(items),
        choices=tuple(chosen),
        protocol=protocol | {"tokenizer": tokenizer_hash(tokenizer), "items": len(items)},
    )


def answer_scores(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase", prompt: str, answers: Sequence[str]
) -> list[float]:
    """Summed log-probability, in nats, of each answer's tokens after the prompt; tokenised together, split where the prompt ends."""
    start = len(tokenizer(prompt)["input_ids"])
    rows = [torch.tensor(tokenizer(prompt + answer)["input_ids"]) for answer in answers]
    # padding on the right comes after every scored token: a causal model does not see it
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_p = logits_of(model, {"input_ids": ids})[:, start - 1 : -1].float().log_softmax(-1).cpu()
    return [
        log_p[index, : len(row) - start].gather(-1, row[start:, None]).double().sum().item()
        for index, row in enumerate(rows)
    ]


def choose(scores: Sequence[float], answers: Sequence[str]) -> tuple[int, int]:
    """The best answer by score, and by score per character of the answer; the first of equals."""
    normalised = [score / max(1, len(answer)) for score, answer in zip(scores, answers, strict=True)]
    return scores.index(max(scores)), normalised.index(max(normalised))


def _read(path: Path, limit: int | None) -> list[tuple[str, list[str], int]]:
    """(goal, answers, label) of every line. Raises DataError, naming the line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text. Give a .jsonl file.") from error
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            numbers = sorted(int(name[3:]) for name in record if re.fullmatch(r"sol[1-9][0-9]{0,3}", name))
            answers = [record[f"sol{place}"] for place in numbers]
            goal, label = record["goal"], record["label"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: item {number} needs `goal`, `sol1`, `sol2` and `label` ({error}).") from error
        if not all(isinstance(one, str) and one for one in (goal, *answers)):
            raise DataError(f"{path}: item {number}: `goal` and every `sol` must be text that is not empty.")
        if numbers != list(range(1, len(numbers) + 1)):
            raise DataError(f"{path}: item {number} has answers {numbers}. Number them from `sol1` without a gap.")
        if len(answers) < 2 or type(label) is not int or label not in range(len(answers)):
            raise DataError(
                f"{path}: item {number} has {len(answers)} answers and label {label}. Give 2 or more, the label from 0."
            )
        items.append((goal, answers, label))
    if not items:
        raise DataError(f"{path}: no items in this file.")
    return items
