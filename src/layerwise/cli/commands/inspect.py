"""`layerwise inspect`: what a model is made of."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.text import Text

from ...errors import ConfigError
from ...settings import nearest
from .. import options
from ..given import CALIBRATION, check_png, refuse
from ..inputs import DataChoice, ModelChoice, protocol_line
from ..plan_tables import show_entries
from ..planning import alphas_folder
from ..running import show_notes
from ..screen import Screen, table

if TYPE_CHECKING:
    from torch import nn

    from ...plan import Plan
    from ...structure import Layer, Structure
    from ...tasks import Batches


def inspect(
    context: typer.Context,
    model: options.Model,
    layers: options.Layers = False,
    score: options.Score = None,
    plan: options.ShownPlan = None,
    plot: options.Plot = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    data: options.Data = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    batch: options.Batch = None,
    seed: options.Seed = 0,
    remote_code: options.RemoteCode = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show the layers of a model: names, roles, shapes, sizes, and the zeros they hold.

    [dim]Example:[/]  layerwise inspect demo --layers --include '*.mlp.*'
    [dim]Scores:[/]  layerwise inspect demo --score outlier-ratio
    [dim]A plan:[/]  layerwise inspect demo --plan plan.yaml
    [dim]Spectra:[/]  layerwise inspect demo --score alpha-hill --plot spectra.png
    """
    from ...plan import Plan
    from ...scores import SCORES, WITHOUT_DATA

    if score is not None and score not in SCORES:
        raise ConfigError(f'unknown score "{score}".{nearest(score, SCORES)} Scores: {", ".join(SCORES)}.')
    reads = score is not None and score not in WITHOUT_DATA
    if not reads:
        why = "without --score nothing is measured" if score is None else f"since {score} looks at weights alone"
        refuse(context, why, *CALIBRATION, "seed")
    if plot is not None:
        _check_plot(plot, score, force)
    else:
        refuse(context, "without --plot there is nothing to replace", "force")
    screen = Screen(json=json, quiet=quiet)
    choice = ModelChoice(model, include=tuple(include or ()), exclude=tuple(exclude or ()), remote_code=remote_code)
    drawn = DataChoice(data, samples, length, batch, seed).draw(choice, screen) if reads else None
    made = None if plan is None else Plan.load(plan)
    loaded = choice.load(screen)
    structure = choice.structure(loaded)
    whole = structure if made is None else _checked(made, loaded)
    scores = _measured(score, loaded, drawn, structure, plot, screen) if score else {}
    zeros = _zeros(loaded, structure)
    chosen = sum(layer.size for layer in structure.layers)
    screen.show(
        f"[bold]{escape(model)}[/]: {type(loaded).__name__}, {structure.parameters:,} parameters, {choice.bytes:,} bytes",
        *(f"{len(stack.blocks)} blocks in {stack.name}" for stack in structure.stacks),
        f"{len(structure.layers)} layers to compress: {chosen:,} weights, {chosen / structure.parameters:.1%} of the model\n",
        _layers(structure, zeros) if layers else _roles(structure, zeros),
        *(f"\nleft out: {count} × {reason}" for reason, count in Counter(r for _, r in structure.left_out).items()),
    )
    if score:
        _show_scores(score, scores, structure, drawn, screen)
    if made is not None:
        screen.show("")
        show_entries(made, whole, screen)
        show_notes(made.notes, screen)
    if plot is not None:
        screen.show(escape(f"Spectra of the layers, and their fits: {plot}"))
    measured = {"score": score, "scores": scores} if scores else {}
    planned = {} if made is None else {"plan": made.to_dict()}
    screen.show_json({**_facts(model, loaded, structure, zeros), **measured, **planned})


def _checked(made: "Plan", model: "nn.Module") -> "Structure":
    """Every weight of the model, that a plan may name. Raises PlanError if it does not fit."""
    from ...structure import structure_of

    structure = structure_of(model, include=["*"])
    made.check(
        structure.layers,
        blocks=[block.name for block in structure.blocks],
        attentions=structure.attentions,
        fingerprint=structure.fingerprint,
    )
    return structure


def _check_plot(plot: Path, score: str | None, force: bool) -> None:
    if score != "alpha-hill":
        raise ConfigError("--plot draws the spectra behind --score alpha-hill; ask for that score.")
    check_png(plot, force)


def _measured(
    score: str,
    model: "nn.Module",
    data: "Batches | None",
    structure: "Structure",
    plot: Path | None,
    screen: Screen,
) -> dict[str, float]:
    """The score by block or layer; the picture is written on the way, since it needs the spectra that alpha comes from."""
    from ...report import plot_spectra, view_of
    from ...scores import SCORES, alphas_kept, layer_tails, watched

    with screen.task(f"Measuring {score}") as step, watched(step), alphas_kept(alphas_folder()):
        if plot is None:
            return SCORES[score](model, data, structure)
        found, views = {}, []
        for tail in layer_tails(model, structure, spectra=True):
            views.append(view_of(structure.layer(tail.name), tail))
            if tail.alpha is not None:
                found[tail.name] = tail.alpha
    plot_spectra(views, plot)
    return found


def _show_scores(
    score: str, scores: dict[str, float], structure: "Structure", data: "Batches | None", screen: Screen
) -> None:
    """A bar for each block; of a score of layers their mean."""
    from ...scores import LOW_KEEPS

    blocks = {
        block.name: [scores[layer.name] for layer in block.layers if layer.name in scores] for block in structure.blocks
    }
    means = {name: sum(some) / len(some) for name, some in blocks.items() if some}
    of = "mean of the layers of each block" if means else "of each block" if structure.blocks else "of each layer"
    keeps = "low" if score in LOW_KEEPS else "high"
    screen.show(f"\n[bold]{score}[/], {of} ({keeps} = keep)", _bars(means or scores, screen))
    if data is not None:
        screen.show(protocol_line(data))
    absent = len(structure.layers) - len(scores)
    if means and absent:
        screen.say(f"note: {absent} of {len(structure.layers)} layers have no {score}", style="yellow")


def _zeros(model: "nn.Module", structure: "Structure") -> dict[str, int]:
    from ...evaluate import count_zeros

    counted = count_zeros(model, {layer.parameter for layer in structure.layers}).zeros
    return {layer.name: counted[layer.parameter] for layer in structure.layers}


def _bars(scores: dict[str, float], screen: Screen) -> Text:
    from ...report import bar_chart

    return Text(bar_chart(scores, min(100, screen.out.width), ascii_only=screen.out.encoding == "ascii"), style="cyan")


def _shape(layer: "Layer") -> str:
    matrices = f"{layer.matrices} × " if layer.matrices > 1 else ""
    return f"{matrices}{layer.rows} × {layer.columns}"


def _roles(structure: "Structure", zeros: dict[str, int]) -> Any:
    rows = table("role", "kind", "layers", "outputs × inputs", "weights", "share", "zeros", left=2)
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in structure.layers:
        groups.setdefault((layer.role, layer.kind, _shape(layer)), []).append(layer)
    for (role, kind, shape), members in groups.items():
        size = sum(layer.size for layer in members)
        empty = sum(zeros[layer.name] for layer in members)
        share = f"{size / structure.parameters:.1%}"
        rows.add_row(role, kind, str(len(members)), shape, f"{size:,}", share, f"{empty / size:.1%}")
    return rows


def _layers(structure: "Structure", zeros: dict[str, int]) -> Any:
    rows = table("layer", "role", "kind", "outputs × inputs", "weights", "zeros", left=3)
    for layer in structure.layers:
        empty = f"{zeros[layer.name] / layer.size:.1%}"
        rows.add_row(layer.name, layer.role, layer.kind, _shape(layer), f"{layer.size:,}", empty)
    return rows


def _facts(name: str, model: "nn.Module", structure: "Structure", zeros: dict[str, int]) -> dict[str, Any]:
    return {
        "model": name,
        "class": type(model).__name__,
        "parameters": structure.parameters,
        "fingerprint": structure.fingerprint,
        "stacks": {stack.name: len(stack.blocks) for stack in structure.stacks},
        "layers": [
            {
                "name": layer.name,
                "role": layer.role,
                "kind": layer.kind,
                "block": layer.block,
                "shape": list(layer.shape),
                "matrices": layer.matrices,
                "rows": layer.rows,
                "columns": layer.columns,
                "weights": layer.size,
                "zeros": zeros[layer.name],
            }
            for layer in structure.layers
        ],
        "left_out": {layer.name: reason for layer, reason in structure.left_out},
    }
