"""`layerwise demo`: all of it on the model inside the package, offline, in a minute or two."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .. import options
from ..inputs import DataChoice, ModelChoice, environment_line, protocol_line
from ..planning import with_facts
from ..screen import Screen
from ..settings import MethodChoice, device_of, solver_of
from ..tables import by_budget, results_table, write_report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...evaluate.compare import Cell, Recipe, Row
    from ...io import Saved
    from ...plan import Plan
    from ...structure import Structure

METHODS, SOLVERS = ("uniform", "random", "erk", "owl"), ("wanda", "sparsegpt")
PROMPT = "for line in file:\n    line = line."
WRITTEN, PENALTY = 48, 1.15  # tokens of the continuation; so small a model repeats itself without a penalty


def demo(
    sparsity: options.OneSparsity = 0.6,
    samples: options.Samples = 32,
    tokens: options.ScoredTokens = 16_384,
    model: options.OtherModel = "demo",
    data: options.Data = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    output: options.DemoOut = Path("layerwise-demo"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune the model inside this package in eight ways, compare them, save the best, load it back and let it write.

    [dim]Example:[/]  layerwise demo --sparsity 0.5
    """
    import copy

    from ...engine import Settings
    from ...evaluate.compare import cells, rows, verdict
    from ...io import check_output

    screen, started = Screen(json=json, quiet=quiet), time.perf_counter()
    where = device_of(device)
    choice = ModelChoice(model, "float32")
    check_output(output, force=force, needed=choice.bytes)
    choice.check_perplexity()
    source = DataChoice(data or "python-docs", samples, min(512, choice.length(None)), seed=seed)
    drawn, windows = source.draw(choice, screen), source.read(choice, screen, tokens)
    loaded = choice.load(screen, device=where)
    structure = choice.structure(loaded)
    dense = copy.deepcopy(loaded)
    _introduce(model, loaded, structure, sparsity, screen)
    recipes, done, kept = _recipes(sparsity, seed), [], _Kept()
    with screen.task("Pruning and measuring") as step:
        for cell in cells(
            loaded, dense, recipes, calibration=lambda _: drawn, held_out=windows, structure=structure,
            settings=Settings(device=None if where.type == "cpu" else where),
            progress=lambda now: step(now.done, now.total, f"{now.recipe.name}, {now.recipe.solver.name}: {now.stage}"),
        ):  # fmt: skip
            done.append(cell)
            kept.see(cell, loaded, structure)
    plans = {cell.recipe.name: cell.plan for cell in done}
    verdicts = [verdict(group) for group in by_budget(rows(done))]
    protocol = {
        "calibration": protocol_line(drawn), "measured on": protocol_line(windows), "with": environment_line(done[0].evaluation.protocol),
    }  # fmt: skip
    _show_plans(plans, structure, screen)
    screen.show("[bold]What it cost[/]", results_table(rows(done), done[0].evaluation.dense_perplexity or 0.0), "")
    screen.show(*verdicts, *(f"[dim]{key}: {escape(protocol[key])}[/]" for key in protocol))
    saved = kept.save(choice, loaded, structure, output, force, screen)
    picture = _write_pictures(
        output,
        plans,
        structure,
        rows(done),
        done[0].evaluation.dense_perplexity or 0.0,
        verdicts,
        protocol,
        saved,
        screen,
    )
    written = _write(choice, dense, output, screen)
    _show_saved(kept, saved, output, picture, written, time.perf_counter() - started, screen)
    screen.show_json(
        {
            "dense": {"perplexity": done[0].evaluation.dense_perplexity},
            "cells": [cell.to_dict() for cell in done],
            "verdicts": verdicts,
            "protocol": protocol,
            "output": str(output),
            "continuations": written,
        }
    )


@dataclass
class _Kept:
    """The best cell so far, the random control left out, with its weights."""

    cell: "Cell | None" = None
    weights: "dict[str, Tensor]" = field(default_factory=dict)

    def see(self, cell: "Cell", model: "nn.Module", structure: "Structure") -> None:
        """Called while `model` holds the cell's weights."""
        if cell.recipe.name == "random":
            return
        if self.cell is None or cell.evaluation.perplexity < self.cell.evaluation.perplexity:
            self.cell = cell
            self.weights = {
                layer.parameter: model.get_parameter(layer.parameter).detach().clone() for layer in structure.layers
            }

    def save(
        self, choice: ModelChoice, model: "nn.Module", structure: "Structure", output: Path, force: bool, screen: Screen
    ) -> "Saved":
        """Write the best, in the dtype in which the dense model is stored."""
        import torch

        from ...io import load_tokenizer, save

        assert self.cell is not None  # noqa: S101  (seven cells came before)
        for name, weight in self.weights.items():
            model.get_parameter(name).data.copy_(weight)
        stored = getattr(torch, str(choice.config.get("dtype", "float32")), torch.float32)
        plan = with_facts(self.cell.plan, choice, structure, self.cell.recipe.solver)
        found = self.cell.evaluation
        with screen.task(f"Saving to {output} and loading it back"):
            return save(
                model.to(stored), output, tokenizer=load_tokenizer(choice.name), plan=plan, force=force, dense=choice.folder,
                result={"perplexity": found.perplexity, "dense_perplexity": found.dense_perplexity, "kl": found.kl,
                        "top1": found.top1, "sparsity": self.cell.achieved, "protocol": found.protocol},
            )  # fmt: skip


def _recipes(sparsity: float, seed: int) -> "list[Recipe]":
    from ...evaluate.compare import Recipe

    return [
        Recipe(name, MethodChoice(name, sparsity).build(seed=seed), sparsity, seed, solver_of(solver, ()))
        for solver in SOLVERS
        for name in METHODS
    ]


def _introduce(name: str, model: "nn.Module", structure: "Structure", sparsity: float, screen: Screen) -> None:
    weights = sum(layer.size for layer in structure.layers)
    origin = ", trained on the standard library's source and documentation" if name == "demo" else ""
    screen.show(
        f"[bold]{escape(name)}[/]: {type(model).__name__}, {structure.parameters:,} parameters{origin}.",
        f"{len(structure.layers)} layers in {len(structure.blocks)} blocks; of their {weights:,} weights {sparsity:.0%} go:"
        f" {' and '.join(METHODS[:2])} as controls, {' and '.join(METHODS[2:])}; each with {' and '.join(SOLVERS)}.\n",
    )


def _show_plans(plans: "dict[str, Plan]", structure: "Structure", screen: Screen) -> None:
    """ERK differs by role and OWL by block; each is drawn along what it differs in, side by side."""
    from rich.text import Text

    from ...report import bar_chart

    half = max(20, (min(screen.out.width, 110) - 4) // 2)
    ascii_only = not (screen.out.encoding or "").startswith("utf")
    roles = {layer.name: layer.role for layer in structure.layers}
    numbers = {block.name: f"block {number}" for number, block in enumerate(structure.blocks)}
    blocks = {layer.name: numbers[layer.block] for layer in structure.layers if layer.block}
    charts = [
        ("erk: sparsity by role", _shares(plans["erk"], structure, roles)),
        ("owl: sparsity by block", _shares(plans["owl"], structure, blocks)),
    ]
    grid = Table.grid(padding=(0, 4))
    grid.add_row(*(f"[bold]{title}[/]" for title, _ in charts))
    grid.add_row(
        *(
            Text(bar_chart(shares, half, form=".1%", maximum=1.0, ascii_only=ascii_only), style="cyan")
            for _, shares in charts
        )
    )
    screen.show(grid, "")


def _shares(plan: "Plan", structure: "Structure", groups: dict[str, str]) -> dict[str, float]:
    """Group -> sparsity over its layers. groups: layer name -> group."""
    zeros, sizes, empty = plan.zeros(structure.layers), dict[str, int](), dict[str, int]()
    for layer in structure.layers:
        if (group := groups.get(layer.name)) is not None and layer.name in zeros:
            sizes[group] = sizes.get(group, 0) + layer.size
            empty[group] = empty.get(group, 0) + zeros[layer.name]
    return {group: empty[group] / size for group, size in sizes.items()}


def _write_pictures(
    output: Path, plans: "dict[str, Plan]", structure: "Structure", made: "list[Row]", dense: float, verdicts: list[str],
    protocol: dict[str, Any], saved: "Saved", screen: Screen,
) -> str | None:  # fmt: skip
    """sparsities.png (with matplotlib) and report.html beside the weights; what to say if there is no picture."""
    from ...errors import MissingExtra
    from ...report import plot_sparsities

    outcome = [*verdicts, *saved.lines()]
    write_report(output / "report.html", "layerwise demo", protocol, made, dense, outcome, plans, structure)
    try:
        with screen.task("Drawing"):
            plot_sparsities(plans, structure.layers, output / "sparsities.png")
    except MissingExtra as error:
        return str(error)
    return None


def _write(choice: ModelChoice, dense: "nn.Module", output: Path, screen: Screen) -> dict[str, str]:
    """A short continuation by the dense model and by the saved one, loaded back from its folder."""
    from ...io import load, load_tokenizer

    tokenizer = load_tokenizer(output)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = {}
    with screen.task("Loading it back and writing with it"):
        for name, model in (("dense", dense), ("pruned", load(output, dtype="float32"))):
            made: Any = model.generate(  # type: ignore[operator]
                ids.to(model.device),
                max_new_tokens=WRITTEN,
                do_sample=False,
                repetition_penalty=PENALTY,
                pad_token_id=0,
            )
            written[name] = tokenizer.decode(made[0], skip_special_tokens=True)
    return written


def _show_saved(
    kept: _Kept,
    saved: "Saved",
    output: Path,
    missing: str | None,
    written: dict[str, str],
    seconds: float,
    screen: Screen,
) -> None:
    from rich.panel import Panel
    from rich.text import Text

    assert kept.cell is not None  # noqa: S101
    recipe = kept.cell.recipe
    screen.show(
        "", f"[bold]Saved: {recipe.name} with {recipe.solver.name}, in {escape(str(output))}[/]", *saved.lines()
    )
    screen.show(
        missing
        or f"Sparsities of every layer: {output / 'sparsities.png'}; everything on one page: {output / 'report.html'}",
        "",
    )
    grid = Table.grid(padding=(0, 1), expand=False)
    width = min(screen.out.width, 110) // 2 - 1
    grid.add_row(
        *(
            Panel(Text(text.rstrip()), title=f"{name} writes", title_align="left", width=width, border_style="dim")
            for name, text in written.items()
        )
    )
    screen.show(
        grid,
        f"{seconds:.0f} s in all. Next: layerwise compress demo --method owl --sparsity 0.5 -o out; layerwise compress --help",
    )
