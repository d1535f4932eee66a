"""`layerwise plan`: decide, write the decision down, change nothing."""

import typer
from rich.markup import escape

from .. import options
from ..cache_tables import show_cache, show_front
from ..given import CALIBRATION, SHARING, refuse
from ..inputs import DataChoice, ModelChoice
from ..plan_tables import show_plan
from ..planning import make_plan, record_of, tried_of
from ..running import show_notes
from ..screen import Screen
from ..settings import MethodChoice


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
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    output: options.PlanOut = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Decide how sparse each layer gets, or how many bits, and write the plan to a file that can be read, edited and applied.

    [dim]Example:[/]  layerwise plan demo --method erk --sparsity 0.6 -o plan.yaml
    [dim]Bits:[/]     layerwise plan demo --method lwq --bits 3.25 --levels 2,4 -o plan.yaml
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
        refuse(context, "since --edit starts from a plan: change its file", *SHARING, "for_", *CALIBRATION, "seed")
    if not rebalance:
        refuse(context, "without --rebalance every layer stays as it is", "keep")
    chosen_globs = (
        (tuple(include or ()), tuple(exclude or ())) if edit is None else (("*",), ())
    )  # a plan names its layers itself
    choice = ModelChoice(model, dtype, *chosen_globs, remote_code)
    chosen = MethodChoice(
        method, sparsity, pattern, min_sparsity, max_sparsity, tuple(set_ or ()), minutes, bits, levels, for_
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
            if not getattr(built, "draws", hasattr(built, "seed")):
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
    if not cached or made.zeros(structure.layers) or any(entry.quantize for entry in made.layers.values()):
        show_plan(made, structure, screen)
    if edit is not None:
        show_notes(made.notes, screen)
    if output is not None and cached:
        screen.show(
            escape(f"\nWritten to {output}. Measure it: layerwise evaluate {model} --plan {output} --data TEXT")
        )
    elif output is not None:
        screen.show(escape(f"\nWritten to {output}. Apply it: layerwise compress {model} --plan {output} -o OUT"))
    screen.show_json({"output": None if output is None else str(output), "plan": made.to_dict(), **tried_of(search)})
