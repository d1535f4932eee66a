"""`layerwise plan`: decide, write the decision down, change nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from ...errors import OutputError
from .. import options, shape_options
from ..cache_tables import show_front
from ..given import CALIBRATION, SHARING, check_png, refuse, refuse_existing
from ..inputs import DataChoice, ModelChoice
from ..plan_tables import show_entries
from ..planning import make_plan, record_of, tried_of
from ..running import show_notes
from ..screen import Screen
from ..settings import MethodChoice, device_of
from ..train_tables import trains

if TYPE_CHECKING:
    from ...methods import KVSearch, Search
    from ...plan import Plan
    from ...structure import Structure


def plan(
    context: typer.Context,
    model: options.Model,
    include: options.Include = None,
    exclude: options.Exclude = None,
    method: options.Method = None,
    sparsity: options.Sparsity = None,
    parameters: shape_options.Parameters = None,
    macs: shape_options.Macs = None,
    latency: shape_options.Latency = None,
    pattern: options.Pattern = None,
    bits: options.Bits = None,
    levels: options.Levels = None,
    for_: options.For = None,
    set_: options.Set = None,
    min_sparsity: options.MinSparsity = None,
    max_sparsity: options.MaxSparsity = None,
    minutes: options.Minutes = None,
    storage: options.Storage = None,
    edit: options.Edit = None,
    rebalance: options.Rebalance = False,
    keep: options.Keep = None,
    data: options.Data = None,
    samples: options.Samples = 128,
    length: options.Length = None,
    batch: options.Batch = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    output: options.PlanOut = None,
    plot: options.PlanPlot = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Decide how sparse each layer gets, or how many bits, and write the plan to a file that can be read, edited and applied.

    [dim]Example:[/]  layerwise plan demo --method erk --sparsity 0.6 -o plan.yaml
    [dim]Bits:[/]     layerwise plan demo --method lwq --bits 3.25 --levels 2,4 -o plan.yaml
    [dim]Whatever is best for one solver:[/]  layerwise plan demo --method auto --set solver=sparsegpt --minutes 5 -o plan.yaml
    [dim]Blocks of weights:[/]  layerwise plan MODEL --method lpvit --pattern block:16x16 --sparsity 0.4 --data IMAGES -o plan.yaml
    [dim]Bits of the KV cache:[/]  layerwise plan demo --method kvtuner --bits 4 --minutes 5 -o plan.yaml
    [dim]Heads and channels:[/]  layerwise plan demo --method adapt-pruner --parameters 0.7 -o plan.yaml
    [dim]Of training:[/]  layerwise plan demo --method owlore --set blocks=2 -o train.yaml
    [dim]After edits by hand:[/]  layerwise plan demo --edit plan.yaml --rebalance --keep '*.down_proj' -o plan2.yaml
    """
    from ...io import check_experts, planned_schemes, target_of

    screen = Screen(json=json, quiet=quiet)
    if output is not None and output.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise OutputError(f'output "{output}": give a name that ends in .yaml or .json.')
    refuse_existing(output, force)
    check_png(plot, force)
    _check_given(context, output or plot, edit, rebalance)
    # a plan that is edited names its layers itself
    globs = (tuple(include or ()), tuple(exclude or ())) if edit is None else (("*",), ())
    choice = ModelChoice(model, dtype, *globs, remote_code)
    search = None
    if edit is not None:
        structure = choice.structure(choice.load(screen))
        made = _edited(edit, structure, (keep or []) if rebalance else None)
    else:
        chosen = MethodChoice(
            method,
            sparsity,
            pattern,
            min_sparsity,
            max_sparsity,
            tuple(set_ or ()),
            minutes,
            bits,
            levels,
            for_,
            parameters,
            macs,
            latency,
        )
        built = chosen.build(seed=seed)
        _check_used(context, built)
        where = device_of(device)
        drawn = DataChoice(data, samples, length, batch, seed).draw(choice, screen) if built.needs_data else None
        loaded = choice.load(screen, device=where)
        structure = choice.structure(loaded)
        if for_ and chosen.treatment == "quantize":
            check_experts(loaded, dict.fromkeys(layer.name for layer in structure.layers), target_of(for_))
        record = None if output is None else record_of(output)
        made, search = make_plan(built, choice, loaded, structure, drawn, screen, record=record, storage=storage)
        if for_:
            check_experts(loaded, planned_schemes(made), target_of(for_))
    if output is not None:
        made.save(output, force=force)
        record_of(output).unlink(missing_ok=True)
    _show(made, structure, search, screen)
    if edit is not None:
        show_notes(made.notes, screen)
    if plot is not None:
        _draw(made, structure, plot, screen)
    if output is not None:
        screen.show(escape(f"\nWritten to {output}. {_use(made, model, output)}"))
    screen.show_json({"output": None if output is None else str(output), "plan": made.to_dict(), **tried_of(search)})


def _use(made: "Plan", model: str, output: Path) -> str:
    """What comes next with this plan."""
    if any(entry.cache for entry in made.layers.values()):
        return f"Measure it: layerwise evaluate {model} --plan {output} --data TEXT"
    if trains(made) and all(entry.model_fields_set == {"train"} for entry in made.layers.values()):
        return "Train by it: method_from(**plan.method).sampling(model, plan), see examples/train_few_blocks.py"
    return f"Apply it: layerwise compress {model} --plan {output} -o OUT"


def _check_given(context: typer.Context, output: Path | None, edit: Path | None, rebalance: bool) -> None:
    """Refuse options that these others leave without a meaning."""
    if output is None:
        refuse(context, "without --output there is nothing to replace", "force")
    if edit is None:
        refuse(context, "without --edit PLAN there is nothing to shift", "rebalance", "keep")
    else:
        refuse(
            context,
            "since --edit starts from a plan: change its file",
            *SHARING,
            "for_",
            *CALIBRATION,
            "seed",
            "device",
        )
    if not rebalance:
        refuse(context, "without --rebalance every layer stays as it is", "keep")


def _check_used(context: typer.Context, method: Any) -> None:
    """Refuse options that this method does not look at."""
    if method.name == "kvtuner":
        refuse(context, "since method kvtuner decides for attentions, not for weights", "include", "exclude")
    else:
        refuse(context, f"since method {method.name} searches in no storage", "storage")
    if not method.needs_data:
        refuse(context, f"since method {method.name} looks at weights alone", *CALIBRATION)
        if not getattr(method, "draws", hasattr(method, "seed")):
            refuse(context, f"since method {method.name} draws nothing", "seed")


def _edited(path: Path, structure: "Structure", keep: list[str] | None) -> "Plan":
    """The plan of this file, checked against the model. keep: globs of what stays while the rest is rebalanced; None: all stays."""
    from ...plan import Plan

    made = Plan.load(path)
    if keep is not None:
        made = made.rebalance(structure.layers, keep)
    made.check(
        structure.layers,
        blocks=[block.name for block in structure.blocks],
        attentions=structure.attentions,
        fingerprint=structure.fingerprint,
    )
    return made.with_achieved(structure.layers)


def _show(made: "Plan", structure: "Structure", search: "Search | KVSearch | None", screen: Screen) -> None:
    from ...methods import KVSearch

    if isinstance(search, KVSearch):
        show_front(search, screen)
    show_entries(made, structure, screen)


def _draw(made: "Plan", structure: "Structure", path: Path, screen: Screen) -> None:
    """Bits by block where the plan quantises, else sparsities; a note where it does neither."""
    from ...report import plot_bits, plot_sparsities

    bits = any(entry.quantize for entry in made.layers.values())
    if not bits and not any(entry.prune for entry in made.layers.values()):
        screen.say("note: nothing is drawn: the plan has neither sparsities nor bits of weights.", style="yellow")
        return
    draw = plot_bits if bits else plot_sparsities
    draw({str(made.method.get("name", "plan")): made}, structure.layers, path)
    screen.show(escape(f"\nDrawn: {path}"))
