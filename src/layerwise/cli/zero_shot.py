"""`layerwise evaluate --tasks`: tasks of lm-evaluation-harness, beside the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.markup import escape

from ..errors import ModelError
from .inputs import ModelChoice, environment_line, hash_line
from .screen import Screen, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..evaluate import Figure, HarnessResult

SHOWN = 8  # tasks described for people


def zero_shot(
    choices: dict[str, ModelChoice],
    words: str,
    screen: Screen,
    *,
    limit: int | None,
    batch: int,
    length: int | None,
    device: "torch.device",
) -> None:
    """Run the tasks that `words` names on "model" and, if it is there, on "dense"; show figures, errors and paired differences."""
    from ..evaluate import differences, find_tasks, harness
    from ..io import load_tokenizer

    if blind := [choice.name for choice in choices.values() if choice.sees]:
        raise ModelError(
            f'model "{blind[0]}" is an image classifier: --tasks needs a language model. Give --data instead.'
        )
    with screen.task("Reading tasks"):
        tasks = find_tasks([word.strip() for word in words.split(",") if word.strip()])
    longest = min(choice.length(length) for choice in choices.values())
    results: dict[str, HarnessResult] = {}
    for name, choice in reversed(choices.items()):
        model = choice.load(screen)  # one at a time: they need not be in memory together
        tokenizer = load_tokenizer(choice.name, remote_code=choice.remote_code)
        with screen.task(f"Running tasks on {choice.name}") as step:
            results[name] = harness(
                model, tokenizer, tasks, limit=limit, batch=batch, length=longest, device=device, progress=step
            )
        del model
    found, dense = results["model"], results.get("dense")
    steps = None if dense is None else differences(found, dense)
    for note in found.notes:
        screen.say(f"note: {note}", style="yellow")
    protocol = {**found.protocol, **({} if dense is None else {"dense_model": dense.protocol["model"]})}
    screen.show(
        _table([(choices[name].name, one) for name, one in results.items()], steps),
        f"\n[dim]± standard error over documents{'' if steps is None else '; that of the difference is paired'}[/]",
        *(f"[dim]{escape(line)}[/]" for line in _task_lines(found)),
        f"[dim]with: {environment_line(protocol)}[/]",
        f"[dim]hashes: {hash_line(protocol)}[/]",
    )
    screen.show_json(
        {
            **found.to_dict(),
            "dense": None if dense is None else dense.to_dict(),
            "differences": None
            if steps is None
            else {task: {metric: asdict(one) for metric, one in row.items()} for task, row in steps.items()},
        }
    )


def _table(
    results: "Sequence[tuple[str, HarnessResult]]", steps: "Mapping[str, Mapping[str, Figure]] | None"
) -> "Table":
    """A row per task and metric, the mean of several last; a column per model, the dense one first."""
    from ..evaluate.harness_figures import unweighted

    found = results[-1][1]
    more = () if steps is None else ("difference",)
    made = table("", "", *(escape(name) for name, _ in results), *more, left=2)
    blocks: list[tuple[str, list[Mapping[str, Figure]]]] = [
        (task, [*(one.results[task] for _, one in results), *([] if steps is None else [steps[task]])])
        for task in found.results
    ]
    if len(found.rows) > 1 and found.mean:
        change = [] if steps is None else [unweighted(steps[row] for row in found.rows)]
        blocks.append((f"mean of {len(found.rows)}", [*(one.mean for _, one in results), *change]))
    for name, columns in blocks:
        for index, metric in enumerate(columns[0]):
            cells = [_words(column[metric], signed=place == len(results)) for place, column in enumerate(columns)]
            made.add_row(escape(name) if index == 0 else "", escape(metric), *cells)
    return made


def _words(figure: "Figure", *, signed: bool) -> str:
    digits = 4 if abs(figure.value) < 10 else 2
    sign = "+" if signed else ""
    error = "" if figure.stderr is None else f" ± {figure.stderr:.{digits}f}"
    return f"{figure.value:{sign}.{digits}f}{error}"


def _task_lines(found: "HarnessResult") -> list[str]:
    facts = found.protocol
    described = [
        f"{name}: version {found.versions[name]}, {found.shots[name]} examples in the prompt, {count} documents, hash {found.hashes[name]}"
        for name, count in found.items.items()
    ]
    rest = [f"and {len(described) - SHOWN} more tasks, see --json"] if len(described) > SHOWN else []
    first = f"measured with: lm-eval {facts['lm_eval']}, windows up to {facts['length']} tokens, no chat template"
    return [first, *described[:SHOWN], *rest]
