"""lm-evaluation-harness on a model in memory, without its side effects (extra `[eval]`).

The harness puts the model into evaluation mode, ties its weights by the configuration, gives the tokenizer a padding token, and reseeds
Python, numpy and torch. Here modes and random states are put back, the tokenizer is a copy, and a model whose head would be
replaced by its embedding is refused. Log-probabilities are taken and summed in float32 whatever the model's dtype: the harness by
itself does so in the model's, and a sum of -1424 in bfloat16 is a multiple of 8.
"""

import copy
import random
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, ModelError, ScoreError
from ..tasks import undisturbed
from ..tasks.text import tokenizer_hash
from ..tasks.undisturbed import random_states
from .harness_figures import (
    Figure,
    Figures,
    entries_of,
    hash_of,
    likelihoods_of,
    metrics_of,
    paired,
    scores_of,
    unweighted,
    with_errors,
)
from .harness_tasks import TaskLike, Tasks, find_tasks, muted, reason_of, require_lm_eval
from .logits import Progress
from .protocol import Protocol, environment_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own


@dataclass(frozen=True)
class HarnessResult:
    """results: task or group -> metric -> figure, named as in the harness ("acc", "acc_norm", "word_perplexity"); acc in [0, 1].

    mean: unweighted over `rows`, of each metric that all of them have. rows: what was asked for; a group with a figure of its own
    counts once, else its parts do.
    versions, shots, items: of each single task: its version, examples in the prompt, documents scored. hashes: of those documents.
    scores: task -> metric -> a number per document, of metrics that are means. log_likelihoods: task -> document -> nats per choice.
    """

    results: Figures
    mean: dict[str, Figure]
    rows: tuple[str, ...]
    versions: dict[str, str]
    shots: dict[str, int]
    items: dict[str, int]
    hashes: dict[str, str]
    scores: dict[str, dict[str, tuple[float, ...]]]
    log_likelihoods: dict[str, tuple[tuple[float, ...], ...]]
    notes: tuple[str, ...]
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def harness(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks | Sequence[TaskLike],
    *,
    limit: int | None = None,
    batch: int = 1,
    length: int = 2048,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> HarnessResult:
    """Run tasks: what `find_tasks` found, or a list for it. Shots as each task says (else none), no chat template.

    limit: the first so many documents of every task. length: longest window, never the model's context by itself. progress: told
    how many requests are answered. Raises what `find_tasks` raises, ModelError (no transformers language model; a head that the
    harness would replace), ConfigError, ScoreError (logits that are not numbers).
    """
    require_lm_eval()
    for name, value in {"limit": 1 if limit is None else limit, "batch": batch, "length": length}.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: give at least 1.")
    _check_model(model)
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks)
    with undisturbed([model], device), random_states():
        output, notes = _run(model, copy.deepcopy(tokenizer), found, limit, batch, length, progress)
        protocol: Protocol = {
            **environment_of(model),
            "lm_eval": version("lm_eval"),
            "tokenizer": tokenizer_hash(tokenizer),
            "bos": "as the tokenizer adds",
            "chat_template": False,
            "softmax": "float32",
            "length": length,
            "batch": batch,
            "limit": limit or "none",
            "seeds": ", ".join(f"{name} {seed}" for name, seed in SEEDS.items()),
        }
        return _result(output, found, (*found.notes, *notes), protocol)


def differences(result: HarnessResult, dense: HarnessResult) -> Figures:
    """result - dense. For means over documents the standard error is of the paired differences, far smaller than that of either
    figure; for others, and for groups, it is None. Raises ConfigError if the two did not score the same documents."""
    for task, found in result.hashes.items():
        if dense.hashes.get(task) != found:
            raise ConfigError(
                f"{task}: the two results are of different documents or prompts, so they have no difference."
            )
    made: Figures = {}
    for task, metrics in result.results.items():
        made[task] = {}
        for metric, figure in metrics.items():
            if metric in result.scores.get(task, {}):
                made[task][metric] = paired(result.scores[task][metric], dense.scores[task][metric])
            else:
                made[task][metric] = Figure(figure.value - dense.results[task][metric].value)
    return made


def _run(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks,
    limit: int | None,
    batch: int,
    length: int,
    progress: Progress | None,
) -> tuple[dict[str, Any], list[str]]:
    """What the harness returns, and its warnings."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with muted():  # it warns that a model in memory is not a name
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=length, softmax_dtype="float32"
        )
    if progress is not None:
        wrapped.set_cache_hook(_Answered(tasks, progress))
    with muted() as notes:
        _seed(tasks)
        try:
            output = lm_eval.evaluate(
                lm=wrapped, task_dict=tasks.loaded, limit=limit, bootstrap_iters=0, log_samples=True
            )
        except AssertionError as error:
            raise _refused(error, length) from error
    return output, notes


def _refused(error: AssertionError, length: int) -> ConfigError:
    """A check of lm-eval's as one line. Those on lengths have no words, or words about a model's longest sequence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    check = last.line or ""
    if "max_length" in check or "max_ctx_len" in check:
        return ConfigError(f"lm-eval refuses: with length={length} an answer does not fit. Give a larger length.")
    where = f"{Path(last.filename).name}, line {last.lineno}"
    return ConfigError(f"lm-eval refuses ({reason_of(error)}; {where}: {check}). Check the task's definition.")


def _seed(tasks: Tasks) -> None:
    """As `lm_eval.simple_evaluate` does, for the same examples in the prompts; the rest of it describes the machine and asks git."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks.single.values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


class _Answered:
    """lm-eval offers every answer to a cache; here they are only counted."""

    def __init__(self, tasks: Tasks, progress: Progress) -> None:
        self.tasks, self.progress = list(tasks.single.values()), progress
        self.done = self.total = 0

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self.total = self.total or sum(len(task.instances) for task in self.tasks)
        self.done += 1
        self.progress(self.done, self.total)


def _result(output: dict[str, Any], tasks: Tasks, notes: tuple[str, ...], protocol: Protocol) -> HarnessResult:
    single, samples = tasks.single, output["samples"]
    entries = {name: entries_of(samples[name]) for name in single}
    raw = {name: with_errors(output["results"][name], entries[name], task) for name, task in single.items()}
    groups = [item for item in tasks.outermost if item not in single.values()]
    for group in [inner for outer in groups for inner in (outer, *outer.get_all_groups())]:
        raw[group.name] = group.aggregate(raw)
    likelihoods = {name: likelihoods_of(samples[name]) for name in single}
    for name, documents in likelihoods.items():
        if any(number != number for choices in documents for number in choices):
            raise ScoreError(f"{name}: the logits are not finite numbers. Check the weights for NaN.")
    results = {name: metrics for name, values in raw.items() if (metrics := metrics_of(values))}
    rows = tuple(name for item in tasks.outermost for name in _rows(item, results))
    return HarnessResult(
        results=results,
        mean=unweighted(results[name] for name in rows),
        rows=rows,
        versions={name: str(output["versions"][name]) for name in single},
        shots={name: int(output["n-shot"][name]) for name in single},
        items={name: int(output["n-samples"][name]["effective"]) for name in single},
        hashes={name: hash_of(samples[name]) for name in single},
        scores={name: scores_of(entries[name], task) for name, task in single.items()},
        log_likelihoods=likelihoods,
        notes=tuple(dict.fromkeys(notes)),
        protocol=protocol,
    )


def _rows(item: Any, results: Figures) -> list[str]:
    """Of a task or group: its own name, or those of its parts where it has no figure of its own."""
    name = getattr(item, "task_name", None) or item.name
    if name in results:
        return [name]
    return [row for part in item for row in _rows(part, results)] if hasattr(item, "get_all_tasks") else []


def _check_model(model: nn.Module) -> None:
    """The harness calls `tie_weights()`: under a tied configuration, a head compressed on its own is lost without a word."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "tie_weights"):
        raise ModelError(f"{type(model).__name__} is no language model of transformers, which lm-eval needs.")
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        raise ModelError(
            "the configuration ties the head to the embedding, but the head has weights of its own, which lm-eval would replace. "
            "Set model.config.tie_word_embeddings = False first."
        )
