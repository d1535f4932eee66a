"""`layerwise inspect`: what a model is made of."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from ...errors import ConfigError
from ...settings import nearest
from .. import options
from ..inputs import DataChoice, ModelChoice, protocol_line
from ..screen import Screen, table

if TYPE_CHECKING:
    from torch import nn

    from ...structure import Layer, Structure


def inspect(
    model: options.Model,
    layers: Annotated[bool, typer.Option("--layers", help="One line per layer instead of one per role.")] = False,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="Show this score: outlier-ratio or block-influence of every block, snip, grasp or synflow of every layer. Reads data.",
            show_default=False,
        ),
    ] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    data: options.Data = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    seed: options.Seed = 0,
    remote_code: options.RemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show the layers of a model: names, roles, shapes, sizes, and the zeros they hold.

    [dim]Example:[/]  layerwise inspect demo --layers --include '*.mlp.*'
    [dim]Scores:[/]  layerwise inspect demo --score outlier-ratio
    """
    from ...scores import SCORES

    if score is not None and score not in SCORES:
        raise ConfigError(f'unknown score "{score}".{nearest(score, SCORES)} Scores: {", ".join(SCORES)}.')
    screen = Screen(json=json, quiet=quiet)
    choice = ModelChoice(model, include=tuple(include or ()), exclude=tuple(exclude or ()), remote_code=remote_code)
    drawn = DataChoice(data, samples, length, 1, seed).draw(choice, screen) if score else None
    loaded = choice.load(screen)
    structure = choice.structure(loaded)
    scores: dict[str, float] = {}
    if score and drawn is not None:
        with screen.task(f"Measuring {score}"):
            scores = SCORES[score](loaded, drawn, structure)
    zeros = _zeros(loaded, structure)
    chosen = sum(layer.size for layer in structure.layers)
    screen.show(
        f"[bold]{escape(model)}[/]: {type(loaded).__name__}, {structure.parameters:,} parameters, {choice.bytes:,} bytes",
        *(f"{len(stack.blocks)} blocks in {stack.name}" for stack in structure.stacks),
        f"{len(structure.layers)} layers to compress: {chosen:,} weights, {chosen / structure.parameters:.1%} of the model\n",
        _layers(structure, zeros) if layers else _roles(structure, zeros),
        *(f"\nleft out: {count} × {reason}" for reason, count in Counter(r for _, r in structure.left_out).items()),
    )
    if scores and drawn is not None:
        screen.show(
            f"\n[bold]{score}[/] of each {_unit(scores, structure)} (high = keep)",
            _bars(scores, screen),
            protocol_line(drawn),
        )
    screen.show_json(
        {**_facts(model, loaded, structure, zeros), **({"score": score, "scores": scores} if scores else {})}
    )


def _zeros(model: "nn.Module", structure: "Structure") -> dict[str, int]:
    from ...evaluate import count_zeros

    counted = count_zeros(model, {layer.parameter for layer in structure.layers}).zeros
    return {layer.name: counted[layer.parameter] for layer in structure.layers}


def _unit(scores: dict[str, float], structure: "Structure") -> str:
    return "block" if scores.keys() <= {block.name for block in structure.blocks} else "layer"


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
