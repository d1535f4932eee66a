"""Tasks of lm-evaluation-harness that need no network, and a tokenizer and models for them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from models import small_llama

END = "<eos>"
EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_eval"
QUESTIONS = EXAMPLE / "stdlib_modules.yaml"
ROWS = [json.loads(line) for line in (EXAMPLE / "stdlib_modules.jsonl").read_text().splitlines()]


def byte_tokenizer():
    """A token per byte and none for padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(token_models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def syllables():
    """Fewer than 50 tokens, some of them longer than a byte."""
    parts = [*" abcdefghijklmnopqrstuvwxyz", "on", "tw", "one"]
    vocabulary = {END: 0} | {part.replace(" ", "Ġ"): index for index, part in enumerate(parts, start=1)}
    backend = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[("o", "n"), ("t", "w"), ("on", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def as_dict(name, **more):
    """The example's questions, defined without a file."""
    return {
        "task": name, "output_type": "multiple_choice", "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in ("acc", "acc_norm")],
        **(more or LOCAL),
    }  # fmt: skip


LOCAL = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(EXAMPLE / "stdlib_modules.jsonl")}}}


def sharp(seed=0):
    """A Llama whose choices are not all the shortest ones, as they would be with weights near zero."""
    model = small_llama(seed, vocab_size=257, max_position_embeddings=256, tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    return model


def rows_of(file, rows):
    """What a task of the harness is told to read these rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    return {**local, "training_split": None, "validation_split": None}


def arc_rows(folder, rows=ROWS):
    """The same for ARC, of the example's questions."""
    labels = ["A", "B", "C", "D"]
    made = [
        {"question": one["question"], "choices": {"text": one["choices"], "label": labels}, "answerKey": labels[one["answer"]]}
        for one in rows
    ]  # fmt: skip
    return rows_of(folder / f"arc{len(rows)}.jsonl", made)


def packaged(folder, name, **local):
    """A file that keeps the prompts of a task of the harness and reads its rows elsewhere."""
    from lm_eval import tasks

    origin = next(Path(tasks.__file__).parent.rglob(f"{name}.yaml"))
    settings = {"include": str(origin), "task": f"local_{name}", **local}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(settings))  # YAML takes JSON
    return file


def few_tasks(monkeypatch):
    """The harness's own index with one folder in place of all: seconds less."""
    from lm_eval import tasks

    class Few(tasks.TaskManager):
        def __init__(self, include_defaults=True, include_path=()):
            own = [Path(tasks.__file__).parent / "arc"] if include_defaults else []
            super().__init__(include_defaults=False, include_path=[*own, *include_path])

    monkeypatch.setattr(tasks, "TaskManager", Few)
