"""`layerwise plan`: decide, write the decision down, change nothing."""

from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.text import Text

from .. import options
from ..cache_tables import show_cache, show_front
from ..given import CALIBRATION, SHARING, refuse
from ..inputs import DataChoice, ModelChoice
from ..planning import make_plan, record_of, tried_of
from ..running import show_notes
from ..screen import Screen, table
from ..settings import MethodChoice

if TYPE_CHECKING:
    from ...plan import Plan
    from ...structure import Structure

MOST_BARS = 48  # a model of more blocks than this gets no chart in the terminal


def plan(
    context: typer.Context,
    model: options.Model,
    include: options.Include = None,
    exclude: options.Exclude = None,
    method: options.Method = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    bits: options.Bits = None,
    levels: options.Levels = None,
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
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    output: options.PlanOut = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Decide how sparse each layer gets, and write the plan to a file that can be read, edited and applied.

    [dim]Example:[/]  layerwise plan demo --method erk --sparsity 0.6 -o plan.yaml
    [dim]Whatever is best for one solver:[/]  layerwise plan demo --method auto --set solver=sparsegpt --minutes 5 -o plan.yaml
    [dim]Bits of the KV cache:[/]  layerwise plan demo --method kvtuner --bits 4 --minutes 5 -o plan.yaml
    [dim]After edits by hand:[/]  layerwise plan demo --edit plan.yaml --rebalance --keep '*.down_proj' -o plan2.yaml
    """
    from ...errors import OutputError
    from ...methods import KVSearch
    from ...plan import Plan

    screen = Screen(json=json, quiet=quiet)
    if output is not None and output.exists() and not force:
        raise OutputError(f'output "{output}" exists already. Give another name, or replace it: --force.')
    if output is None:
        refuse(context, "without --output there is nothing to replace", "force")
    if edit is None:
        refuse(context, "without --edit PLAN there is nothing to shift", "rebalance", "keep")
    else:
        refuse(context, "since --edit starts from a plan: change its file", *SHARING, *CALIBRATION, "seed")
    if not rebalance:
        refuse(context, "without --rebalance every layer stays as it is", "keep")
    chosen_globs = (
        (tuple(include or ()), tuple(exclude or ())) if edit is None else (("*",), ())
    )  # a plan names its layers itself
    choice = ModelChoice(model, dtype, *chosen_globs, remote_code)
    chosen = MethodChoice(
        method, sparsity, pattern, min_sparsity, max_sparsity, tuple(set_ or ()), minutes, bits, levels
    )
    search = None
    if edit is not None:
        made = Plan.load(edit)
        structure = choice.structure(choice.load(screen))
        if rebalance:
            made = made.rebalance(structure.layers, keep or ())
        made.check(
            structure.layers,
            blocks=[block.name for block in structure.blocks],
            attentions=structure.attentions,
            fingerprint=structure.fingerprint,
        )
        made = made.with_achieved(structure.layers)
    else:
        built = chosen.build(seed=seed)
        if built.name == "kvtuner":
            refuse(context, "since method kvtuner decides for attentions, not for weights", "include", "exclude")
        else:
            refuse(context, f"since method {built.name} searches in no storage", "storage")
        drawn = None
        if not built.needs_data:
            refuse(context, f"since method {built.name} looks at weights alone", *CALIBRATION)
            if not hasattr(built, "seed"):
                refuse(context, f"since method {built.name} draws nothing", "seed")
        else:
            drawn = DataChoice(data, samples, length, batch, seed).draw(choice, screen)
        loaded = choice.load(screen)
        structure = choice.structure(loaded)
        record = None if output is None else record_of(output)
        made, search = make_plan(built, choice, loaded, structure, drawn, screen, record=record, storage=storage)
    if output is not None:
        made.save(output, force=force)
        record_of(output).unlink(missing_ok=True)
    cached = any(entry.cache for entry in made.layers.values())
    if isinstance(search, KVSearch):
        show_front(search, screen)
    if cached:
        show_cache(made, screen)
    if not cached or made.zeros(structure.layers):
        _show(made, structure, screen)
    if edit is not None:
        show_notes(made.notes, screen)
    if output is not None and cached:
        screen.show(
            escape(f"\nWritten to {output}. Measure it: layerwise evaluate {model} --plan {output} --data TEXT")
        )
    elif output is not None:
        screen.show(escape(f"\nWritten to {output}. Apply it: layerwise compress {model} --plan {output} -o OUT"))
    screen.show_json({"output": None if output is None else str(output), "plan": made.to_dict(), **tried_of(search)})


def _show(made: "Plan", structure: "Structure", screen: Screen) -> None:
    from ...report import bar_chart

    zeros, sizes = made.zeros(structure.layers), {layer.name: layer.size for layer in structure.layers}
    total = sum(sizes[name] for name in zeros)
    screen.show(
        f"[bold]{made.method.get('name', 'plan')}[/]: {sum(zeros.values()):,} of {total:,} weights become zero"
        f" ({made.achieved_sparsity(structure.layers):.4%} of {len(zeros)} layers)\n"
    )
    blocks: dict[str, float] = {}
    for block in structure.blocks:
        inside = [layer.name for layer in block.layers if layer.name in zeros]
        if inside:
            blocks[block.name] = sum(zeros[name] for name in inside) / sum(sizes[name] for name in inside)
    if 1 < len(blocks) <= MOST_BARS:
        width = min(screen.out.width, 100)
        screen.show(
            Text(
                bar_chart(blocks, width, form=".1%", maximum=1.0, ascii_only=screen.out.encoding == "ascii"),
                style="cyan",
            )
        )
    screen.show("", _by_role(structure, zeros))


def _by_role(structure: "Structure", zeros: dict[str, int]) -> Any:
    rows = table("role", "layers", "weights", "least sparse", "mean", "most sparse")
    groups: dict[str, list[tuple[int, int]]] = {}
    for layer in structure.layers:
        if layer.name in zeros:
            groups.setdefault(layer.role, []).append((zeros[layer.name], layer.size))
    for role, counts in groups.items():
        shares = [empty / size for empty, size in counts]
        empty, size = sum(e for e, _ in counts), sum(s for _, s in counts)
        rows.add_row(
            role, str(len(counts)), f"{size:,}", f"{min(shares):.1%}", f"{empty / size:.1%}", f"{max(shares):.1%}"
        )
    return rows
