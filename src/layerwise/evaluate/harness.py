"""lm-evaluation-harness on a model in memory, without its side effects (extra `[eval]`).

The harness puts the model into evaluation mode, ties its weights by the configuration, and reseeds Python, numpy and torch. Here
modes and random states are put back, and a model whose head would be replaced by its embedding is refused.
"""

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..errors import ConfigError, DataError, MissingExtra, ModelError
from ..tasks import undisturbed
from ..tasks.text import tokenizer_hash
from .protocol import Protocol, environment_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HarnessResult:
    """results: task -> metric -> value, named as in the harness ("acc", "acc_norm", "word_perplexity"); acc in [0, 1].

    mean: unweighted over tasks, of each metric that every task has. versions: of the tasks. items: how many were scored per task.
    """

    results: dict[str, dict[str, float]]
    mean: dict[str, float]
    versions: dict[str, str]
    items: dict[str, int]
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def harness(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str | dict[str, Any]],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
    length: int = 2048,
    shots: int = 0,
    stderr: bool = False,
) -> HarnessResult:
    """Zero-shot by default, no chat template. `include_path`: a folder of task files of your own (see examples/lm_eval).

    Tasks are names or whole definitions as dicts. The harness's own tasks fetch their data from the hub; local ones need no network.
    limit: the first so many items of every task. length: longest window, never the model's context by itself. stderr: by bootstrap.
    Raises MissingExtra, ConfigError (unknown task), ModelError (a head that the harness would replace), DataError (data not to be had).
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra("harness needs lm-evaluation-harness: pip install 'layerwise[eval]'.") from error
    _refuse_untied_head(model)
    manager = _manager(tasks, include_path)
    with undisturbed([model]), _random_states():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=length)
        try:
            output = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit,
                bootstrap_iters=100_000 if stderr else 0, log_samples=False,
            )  # fmt: skip
        except ConnectionError as error:
            raise DataError(
                f"a task's data cannot be fetched ({error}). Use local tasks (include_path) when offline."
            ) from error
    results = {task: _metrics(values) for task, values in output["results"].items()}
    protocol = environment_of(model) | {
        "lm_eval": version("lm_eval"),
        "shots": shots,
        "limit": limit or "none",
        "length": length,
    }
    return HarnessResult(
        results=results,
        mean=_means(results),
        versions={task: str(number) for task, number in output["versions"].items()},
        items={task: counts["effective"] for task, counts in output["n-samples"].items()},
        protocol=protocol | {"tokenizer": tokenizer_hash(tokenizer), "chat_template": False},
    )


def _refuse_untied_head(model: nn.Module) -> None:
    """The harness calls `tie_weights()`: under a tied configuration, a head compressed on its own is lost without a word."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        raise ModelError(
            "the configuration ties the head to the embedding, but the head has weights of its own, which lm-eval would replace. "
            "Set model.config.tie_word_embeddings = False first."
        )


def _manager(tasks: Sequence[str | dict[str, Any]], include_path: str | Path | None) -> Any:
    """Only the local tasks where they suffice: indexing the built-in ones takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path={include_path}: no such folder of task files.")
    path = None if include_path is None else str(include_path)
    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=False, include_path=path)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_defaults=True, include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise ConfigError(f"{name}: no such lm-eval task." + (f" Did you mean {near[0]}?" if near else ""))
    return manager


@contextmanager
def _random_states() -> Iterator[None]:
    """Python's and numpy's; torch's is kept by `undisturbed`."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...} -> {"acc": 0.5}; a filter other than none stays in the name."""
    numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _means(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    shared = set.intersection(*(set(values) for values in results.values())) if results else set()
    names = sorted(name for name in shared if "_stderr" not in name)
    return {name: sum(values[name] for values in results.values()) / len(results) for name in names}
