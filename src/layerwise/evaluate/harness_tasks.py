"""Tasks of lm-evaluation-harness, found and read before any model is needed (extra `[eval]`).

A task is a name that the harness knows, a task file (.yaml) of your own, or a definition as a dict. The harness's own tasks fetch
their data from the hub; a file with local data needs no network (see examples/lm_eval).
"""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, MissingExtra
from ..tasks.undisturbed import random_states

TaskLike = str | Path | Mapping[str, Any]

_GROUP = re.compile(r"""^group\s*:\s*["']?([^"'\s#]+)""", re.MULTILINE)
# said of tasks of its own that leave a setting out, and of every task that makes its data (the option it names is lm-eval's)
_NO_NEWS = ("using default aggregation", "using default higher_is_better", "Custom kwargs can be passed")


@dataclass(frozen=True)
class Tasks:
    """Ready to be run, on one model after another. loaded: as lm-eval hands them to itself; outermost: its objects for what was
    asked for. notes: what it remarked on the way."""

    loaded: Mapping[str, Any]
    outermost: tuple[Any, ...]
    notes: tuple[str, ...] = ()

    @property
    def single(self) -> Mapping[str, Any]:
        """Name -> task, groups resolved."""
        found: Mapping[str, Any] = self.loaded["tasks"]
        return found


def find_tasks(
    wanted: Sequence[TaskLike], *, include_path: str | Path | None = None, shots: int | None = None
) -> Tasks:
    """Names (of tasks, groups or tags), task files and definitions -> tasks with their data. `include_path`: a folder whose task
    files are known by name too. shots: examples in the prompt; None leaves it to each task, none where it says nothing.

    Raises MissingExtra, ConfigError (no such task or file, a task that cannot be used here), DataError (data not to be had).
    """
    require_lm_eval()
    if isinstance(wanted, str | Path) or not wanted:
        raise ConfigError(
            f"tasks={wanted!r}: give a list with at least one task, such as examples/lm_eval/stdlib_modules.yaml."
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path={include_path}: no such folder of task files.")
    if shots is not None and shots < 0:
        raise ConfigError(f"shots={shots}: give 0 or more.")
    words = [str(one) if isinstance(one, Path) else one for one in wanted]
    for word in words:
        if isinstance(word, str) and _is_file(word) and not Path(word).is_file():
            raise ConfigError(f"{word}: no such task file.")
    with random_states(), muted() as notes:
        manager, words = _manager(words, [] if include_path is None else [Path(include_path)])
        outermost = [item for word in words for item in _load(manager, word)]
        try:
            loaded = manager.load(outermost)
        except ValueError as error:  # the same task by itself and in a group
            raise ConfigError(f"{reason_of(error)}. Name each task once.") from error
        for name, task in loaded["tasks"].items():
            _check_offered(name, task)
            _set_shots(name, task, shots)
            if task.get_config("num_fewshot") and _asks_itself(task):  # lm-eval says nothing
                notes.append(
                    f"{name}: it has no split for examples: those in the prompts are other questions of the test."
                )
    return Tasks(loaded, tuple(outermost), tuple(notes))


def require_lm_eval() -> None:
    """Raises MissingExtra."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra("harness needs lm-evaluation-harness: pip install 'layerwise[eval]'.") from error


@contextmanager
def muted() -> Iterator[list[str]]:
    """lm-eval and datasets talk on both streams. Here they do not; warnings of lm-eval are in the list when the block ends."""
    notes: list[str] = []
    logger, handler = logging.getLogger("lm_eval"), _Notes()
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
        notes += handler.lines()


def reason_of(error: BaseException, longest: int = 200) -> str:
    """What an error of another library says, in one line."""
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) <= longest else f"{words[:longest]}…"


class _Notes(logging.Handler):
    """Warnings of one kind, which differ in numbers alone, are one note: every prompt that is too long has its own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kinds: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        note = " ".join(record.getMessage().split())
        if not any(words in note for words in _NO_NEWS):
            self.kinds.setdefault(re.sub(r"\d+", "0", note), []).append(note)

    def lines(self) -> list[str]:
        more = {
            kind: f" ({len(notes) - 1} more like this)" if len(notes) > 1 else "" for kind, notes in self.kinds.items()
        }
        return [f"lm-eval: {notes[0]}{more[kind]}" for kind, notes in self.kinds.items()]


def _is_file(word: str | Mapping[str, Any]) -> bool:
    return isinstance(word, str) and Path(word).suffix in (".yaml", ".yml")


def _manager(
    words: Sequence[str | Mapping[str, Any]], folders: list[Path]
) -> tuple[Any, list[str | Mapping[str, Any]]]:
    """lm-eval's index of tasks, and `words` as it takes them. Only of the local tasks where they suffice: its own take seconds."""
    from lm_eval.tasks import TaskManager

    known: list[str | Mapping[str, Any]] = []
    groups = 0  # they may name tasks of the harness
    for word in words:
        file = Path(word) if isinstance(word, str) and _is_file(word) else None
        found = _GROUP.search(file.read_text("utf-8", errors="replace")) if file is not None else None
        if file is not None and found is not None:
            folders = [*folders, file.parent]  # by its path, lm-eval would take a group's list of tasks for its name
        known.append(word if found is None else found[1])
        groups += found is not None or (not isinstance(word, str) and "group" in word)
    names = [word for word in known if isinstance(word, str) and not _is_file(word)]
    manager = TaskManager(include_defaults=False, include_path=folders)
    if groups or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_defaults=True, include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise ConfigError(f"{name}: no such lm-eval task." + (f" Did you mean {near[0]}?" if near else ""))
    return manager, known


def _load(manager: Any, word: str | Mapping[str, Any]) -> list[Any]:
    """The tasks and groups that `word` names, without those inside its groups."""
    name = word if isinstance(word, str) else word.get("group", word.get("task"))
    try:
        found = manager.load([word])
    except OSError as error:  # connections, files
        raise DataError(
            f"{name}: the task's data cannot be had ({reason_of(error)}). Offline, use a task file with local data."
        ) from error
    except Exception as error:  # a task file is the user's own code and words: anything can be wrong with it
        raise ConfigError(
            f"{name}: not a task that lm-eval can use ({type(error).__name__}: {reason_of(error)})."
        ) from error
    inside = {child for children in found["group_map"].values() for child in children}
    return [item for part in ("groups", "tasks") for key, item in found[part].items() if key not in inside]


def _check_offered(name: str, task: Any) -> None:
    unsafe = getattr(task, "UNSAFE_CODE", False)
    if unsafe or getattr(task, "MULTIMODAL", False):
        what = "runs code that the model wrote" if unsafe else "needs images or sound"
        raise ConfigError(f"{name}: this task {what}, which is not offered here. Use lm-eval itself.")


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 != shots:  # lm-eval would leave it at 0 without a word
        raise ConfigError(
            f"{name}: its definition says num_fewshot: 0, so shots={shots} cannot be had. Change the definition."
        )
    task.set_config("num_fewshot", (own or 0) if shots is None else shots)


def _asks_itself(task: Any) -> bool:
    """Whether examples for the prompts come from the split that is asked."""
    pool = getattr(task, "fewshot_cfg", None)
    named = getattr(pool, "split", None) is not None or getattr(pool, "samples", None) is not None
    return not (named or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs()))
