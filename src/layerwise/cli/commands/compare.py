"""`layerwise compare`: methods × budgets × seeds in one table, with the controls and the protocol."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from .. import options
from ..given import refuse, refuse_existing
from ..inputs import DataChoice, ModelChoice, environment_line, protocol_line
from ..planning import alphas_folder
from ..screen import Screen
from ..settings import MethodChoice, device_of, propagate_of, solver_of
from ..tables import by_budget, results_table, write_report

if TYPE_CHECKING:
    from ...evaluate.compare import Cell, Recipe
    from ...plan import Plan
    from ...structure import Structure
    from ...tasks import Batches


def compare(
    context: typer.Context,
    model: options.Model,
    include: options.Include = None,
    exclude: options.Exclude = None,
    methods: options.Methods = "erk,owl",
    sparsity: options.Sparsities = "0.5",
    seeds: options.Seeds = 1,
    pattern: options.Pattern = None,
    set_: options.Set = None,
    solver: options.Solvers = None,
    solver_set: options.SolverSet = None,
    propagate: options.Propagate = "compressed",
    data: options.Data = None,
    held_out: options.HeldOut = None,
    tokens: options.Tokens = None,
    samples: options.Samples = 128,
    length: options.Length = None,
    batch: options.Batch = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    output: options.TableOut = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune one model by several methods at the same budgets and put the results in one table.

    [dim]Example:[/]  layerwise compare demo --methods erk,owl --sparsity 0.5,0.6 --seeds 3
    """
    import copy

    from ...engine import Settings
    from ...evaluate.compare import cells
    from ...scores import alphas_kept

    screen = Screen(json=json, quiet=quiet)
    if output is None:
        refuse(context, "without --output there is nothing to replace", "force")
    _check_output(output, force)
    choice = ModelChoice(model, dtype, tuple(include or ()), tuple(exclude or ()), remote_code)
    recipes = _recipes(methods, sparsity, range(seed, seed + seeds), pattern, set_ or (), solver, solver_set or ())
    if all(one.solver.needs == "none" for one in recipes):
        refuse(context, "since every solver here looks at weights alone", "propagate")
        if not any(one.method.needs_data for one in recipes):
            unused = ("samples", "data") if held_out else ("samples",)  # of --data the measured text is read otherwise
            refuse(context, "since every method and solver here looks at weights alone", *unused)
    if all(recipe.name != "random" for recipe in recipes):
        screen.say(f"note: no random control: with --pattern {pattern} there is nothing to draw.", style="yellow")
    where = device_of(device)
    settings = Settings(propagate_of(propagate), None if where.type == "cpu" else where)
    _ = choice.bytes  # a damaged file shows before anything slow
    choice.check_perplexity()
    source = DataChoice(data, samples, length, batch, seed)
    if held_out in (None, data) and source.where(choice) != "python-docs":
        screen.say(
            "note: measured on the text that calibration draws from; give another with --held-out.", style="yellow"
        )
    drawn = {number: source.draw(choice, screen, number) for number in range(seed, seed + seeds)}
    windows = DataChoice(held_out or source.where(choice), length=length, batch=batch).read(choice, screen, tokens)
    loaded = choice.load(screen, device=where)
    structure = choice.structure(loaded)
    dense = copy.deepcopy(loaded)
    done: list[Cell] = []
    failed: list[tuple[Recipe, Exception]] = []
    stopped: KeyboardInterrupt | None = None
    with screen.task("Comparing") as step, alphas_kept(alphas_folder()):
        try:
            for cell in cells(
                loaded, dense, recipes, calibration=drawn.__getitem__, held_out=windows, structure=structure, settings=settings,
                progress=lambda now: step(now.done, now.total, f"{now.recipe.name} {now.recipe.sparsity:.0%} {now.stage}"),
                failed=lambda recipe, error: failed.append((recipe, error)),
            ):  # fmt: skip
                done.append(cell)
        except KeyboardInterrupt as stop:  # what was measured is not lost
            stopped = stop
    if not done:
        raise stopped or failed[0][1]
    _show(model, done, failed, structure, drawn[seed], windows, output, screen)
    if stopped:
        raise stopped
    if failed:
        raise typer.Exit(1)


def _recipes(
    methods: str,
    sparsity: str,
    seeds: Sequence[int],
    pattern: str | None,
    settings: Sequence[str],
    solver: str | None,
    solver_set: Sequence[str],
) -> "list[Recipe]":
    """Every cell, controls first. Raises ConfigError before anything is loaded."""
    from ...evaluate.compare import CONTROLS, Recipe

    asked = [name.strip() for name in methods.split(",") if name.strip()]
    budgets = _numbers(sparsity)
    solvers = [solver_of(name.strip(), solver_set) for name in (solver or "wanda").split(",")]
    # random draws a sparsity per layer, and a pattern such as 2:4 leaves nothing to draw
    controls = [name for name in CONTROLS if pattern in (None, "unstructured") or name != "random"]
    names = list(dict.fromkeys([*controls, *asked]))
    found = []
    for one in solvers:
        for budget in budgets:
            for name in names:
                # settings are for the methods asked for; the controls have none that matter
                own = _own(name, asked, settings) if name in asked else ()
                choice = MethodChoice(name, budget, pattern, set=own)
                found += [Recipe(name, choice.build(seed=seed, solver=one.name), budget, seed, one) for seed in seeds]
    return found


def _own(name: str, asked: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Those of `--set` that this method has; and those that none of the methods has, so that it refuses them."""
    from ...methods import METHODS

    known = {one: {field.name for field in fields(METHODS[one])} for one in asked if one in METHODS}  # type: ignore[arg-type]
    keys = [setting.partition("=")[0].strip() for setting in settings]
    return [
        setting
        for key, setting in zip(keys, settings, strict=True)
        if key in known.get(name, ()) or not any(key in names for names in known.values())
    ]


def _numbers(text: str) -> list[float]:
    from ...errors import ConfigError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f'--sparsity "{text}": give fractions separated by commas, such as 0.5,0.6.') from error


def _check_output(output: Path | None, force: bool) -> None:
    from ...errors import OutputError

    if output is None:
        return
    if output.suffix not in (".md", ".html"):
        raise OutputError(f'output "{output}": give a name that ends in .md or .html.')
    refuse_existing(output, force)


def _show(
    model: str,
    done: "list[Cell]",
    failed: "Sequence[tuple[Recipe, Exception]]",
    structure: "Structure",
    data: "Batches",
    windows: "Batches",
    output: Path | None,
    screen: Screen,
) -> None:
    from ...evaluate.compare import rows, verdict

    made, dense = rows(done), done[0].evaluation
    protocol = {
        "model": model,
        "calibration": protocol_line(data),
        "seeds": ", ".join(str(seed) for seed in sorted({cell.recipe.seed for cell in done})),
        "measured on": protocol_line(windows),
        "with": environment_line(dense.protocol),
    }
    verdicts = [verdict(group) for group in by_budget(made)]
    problems = [_problem(*one) for one in failed]
    screen.show(results_table(made, dense.dense_perplexity or 0.0))
    screen.show(
        "",
        *verdicts,
        *(f"[red]{escape(line)}[/]" for line in problems),
        "",
        *(f"[dim]{key}: {escape(value)}[/]" for key, value in protocol.items()),
    )
    if output is not None:
        write_report(
            output,
            f"{model}: methods compared",
            protocol,
            made,
            dense.dense_perplexity or 0.0,
            [*verdicts, *problems],
            _plans(done),
            structure,
        )
        screen.show(escape(f"Written to {output}."))
    screen.show_json(
        {
            "dense": {"perplexity": dense.dense_perplexity},
            "cells": [cell.to_dict() for cell in done],
            "verdicts": verdicts,
            "failed": problems,
            "protocol": protocol,
        }
    )


def _problem(recipe: "Recipe", error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{recipe.name}, {recipe.sparsity:.0%}, {recipe.solver.name}, seed {recipe.seed}: not made: {reason}"


def _plans(done: "Sequence[Cell]") -> "dict[str, Plan]":
    """What each picture shows -> the plan: of the first seed, told apart by budget, and by solver where a method asks for that."""
    budgets = {cell.recipe.sparsity for cell in done}
    found: dict[str, Plan] = {}
    for cell in done:
        recipe = cell.recipe
        name = recipe.name if len(budgets) == 1 else f"{recipe.name}, {recipe.sparsity:.0%}"
        if name in found and found[name].layers != cell.plan.layers and recipe.seed == done[0].recipe.seed:
            name = f"{name}, {recipe.solver.name}"
        found.setdefault(name, cell.plan)
    return found
