"""`layerwise compress`: plan (or take a plan), prune block by block, save, check what was saved."""

from typing import TYPE_CHECKING, Any

import typer

from .. import options, shape_options
from ..given import CALIBRATION, SHARING, refuse
from ..inputs import DataChoice, ModelChoice
from ..narrowing import SOLVING, NarrowJob, reshapes
from ..planning import make_plan, record_of, with_facts, with_solver
from ..running import show_notes, work_folder
from ..screen import Screen
from ..settings import FACTORIZER, MethodChoice, device_of, handed_in, propagate_of, solver_of, treatment_of, tuner_of
from ..solving import SolveJob, show_solved

if TYPE_CHECKING:
    from ...solvers import Solver


def compress(
    context: typer.Context,
    model: options.Model,
    *,
    include: options.Include = None,
    exclude: options.Exclude = None,
    method: options.Method = None,
    sparsity: options.Sparsity = None,
    parameters: shape_options.Parameters = None,
    macs: shape_options.Macs = None,
    latency: shape_options.Latency = None,
    uniform_width: shape_options.UniformWidth = False,
    multiple_of: shape_options.MultipleOf = None,
    save_as: shape_options.SaveAs = None,
    recover_minutes: shape_options.RecoverMinutes = None,
    stages: shape_options.Stages = None,
    pattern: options.Pattern = None,
    bits: options.Bits = None,
    levels: options.Levels = None,
    set_: options.Set = None,
    min_sparsity: options.MinSparsity = None,
    max_sparsity: options.MaxSparsity = None,
    minutes: options.Minutes = None,
    plan: options.Apply = None,
    solver: options.Solver = None,
    solver_set: options.SolverSet = None,
    for_: options.For = None,
    dense: options.Dense = False,
    reconstruct: shape_options.Reconstruct = False,
    reconstruct_set: shape_options.ReconstructSet = None,
    propagate: options.Propagate = "compressed",
    data: options.Data = None,
    samples: options.Samples = 128,
    length: options.Length = None,
    batch: options.Batch = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    stream: options.Stream = False,
    work: options.Work = None,
    spill: options.Spill = None,
    remote_code: options.RemoteCode = False,
    output: options.Out,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune, quantize or factorize a model and save it as a stock folder that transformers loads. Killed and started again, it goes on.

    [dim]Example:[/]  layerwise compress demo --method owl --sparsity 0.6 --solver sparsegpt -o out
    [dim]By a plan:[/]      layerwise compress MODEL --plan plan.yaml --solver gptq --data text.jsonl -o out
    [dim]2 of every 4:[/]  layerwise compress MODEL --pattern 2:4 --data text.jsonl -o out
    [dim]In factors:[/]    layerwise compress MODEL --solver armor --pattern 2:4 --data text.jsonl -o out
    [dim]Really smaller:[/]  layerwise compress MODEL --method adapt-pruner --parameters 0.7 --data text.jsonl -o out
    [dim]And trained in turn:[/]  layerwise compress MODEL --method adapt-pruner --parameters 0.7 --recover-minutes 20 --stages 5 -o out
    [dim]Won back:[/]      layerwise compress MODEL --sparsity 0.6 --reconstruct --data text.jsonl -o out
    [dim]Short of memory:[/]  layerwise compress MODEL --data text.jsonl --stream --spill scratch -o out
    [dim]Several processes:[/]  torchrun --nproc-per-node 2 -m layerwise compress demo -o out
    """
    from ...engine import Ranks, Settings, Work
    from ...io import (
        check_experts,
        check_output,
        check_plan,
        left_dense,
        linears_of,
        need_compressed_tensors,
        planned_schemes,
        target_of,
    )
    from ...methods import Auto, KVTuner
    from ...passes import spilling
    from ...plan import Plan

    screen = Screen(json=json, quiet=quiet)
    target = target_of(for_ or "transformers")
    # a plan names its layers itself
    globs = (tuple(include or ()), tuple(exclude or ())) if plan is None else (("*",), ())
    choice = ModelChoice(model, dtype, *globs, remote_code)
    asked = MethodChoice(
        method or (FACTORIZER if solver == FACTORIZER else None),
        sparsity,
        pattern,
        min_sparsity,
        max_sparsity,
        tuple(set_ or ()),
        minutes,
        bits,
        levels,
        parameters=parameters,
        macs=macs,
        latency=latency,
    )
    if plan is not None:
        refuse(context, "the plan says what is done to which layers (--plan)", *SHARING)
    if stream:
        refuse(context, "streamed models are built by transformers' own classes (--stream)", "remote_code")
    given = Plan.load(plan) if plan is not None else None
    narrower = (
        asked.build(seed=seed) if given is None and (asked.narrows or {parameters, macs, latency} != {None}) else None
    )
    if narrower is not None or (given is not None and reshapes(given)):
        refuse(context, "since heads, channels or blocks are cut, and no weight is solved", *SOLVING)
        if recover_minutes is None:
            refuse(context, "since it goes with --recover-minutes", "stages")
        if not uniform_width:
            refuse(context, "since it goes with --uniform-width", "multiple_of")
        draw = (data, samples, length, batch)
        width = (multiple_of or 64) if uniform_width else None
        NarrowJob(
            choice,
            narrower,
            given,
            output,
            force,
            seed,
            device,
            draw,
            recover_minutes,
            stages or 1,
            width,
            save_as or "auto",
        ).run(screen)
        return
    refuse(context, "since no heads, channels or blocks are cut: use layerwise recover", "recover_minutes", "stages")
    refuse(context, "since no heads or channels are cut", "uniform_width", "multiple_of", "save_as")
    treatment = asked.treatment if given is None else treatment_of(given)
    chosen = solver_of(solver, solver_set or (), given.solver if given is not None else None, treatment)
    if dense and treatment != "factorize":
        refuse(context, "since only layers in factors are multiplied out", "dense")
    if not reconstruct:
        refuse(context, "since it goes with --reconstruct", "reconstruct_set")
    tuner = tuner_of(reconstruct, reconstruct_set or (), seed)
    more = {"target": for_} if for_ else {}  # of methods that plan for one
    built = None if given is not None else asked.build(seed=seed, **handed_in(chosen), **more)
    where = device_of(device)
    ranks = Ranks.join(where)
    check_output(output, force=force, needed=2 * choice.bytes)  # the finished blocks, and the folder made from them
    folder = work or output.with_name(f"{output.name}.work")
    reads = _reads_data(context, chosen, built, tuner)
    drawn = DataChoice(data, samples, length, batch, seed).draw(choice, screen) if reads else None
    with work_folder(folder) if ranks.rank == 0 else Work(folder, lock=False) as held:
        settings = Settings(propagate_of(propagate), None if where.type == "cpu" else where, held, seed)
        loaded = choice.load(screen, stream=stream, device=where if spill is None else None)
        with spilling(loaded, spill):
            structure = choice.structure(loaded)
            if for_ and given is None and treatment == "quantize":
                check_experts(loaded, dict.fromkeys(layer.name for layer in structure.layers), target)
            search = None
            if given is not None:
                show_notes(given.notes, screen)
                final = given if given.model is not None else with_facts(given, choice, structure)
                final = with_solver(final, chosen).with_achieved(structure.layers)
            else:
                made: dict[str, Any] = {}
                # a search is for one process, and takes its time
                if ranks.rank == 0 or not isinstance(built, (Auto, KVTuner)):
                    record = record_of(output)
                    own, search = make_plan(built, choice, loaded, structure, drawn, screen, chosen, settings, record)
                    made = own.to_dict()
                final = Plan.model_validate(ranks.share_object(made, 0))  # the last bit of a score may differ
            check_plan(final, linears_of(loaded), target)
            if for_:
                check_experts(loaded, planned_schemes(final), target)
            else:
                notes = left_dense(loaded, planned_schemes(final), target)
                show_notes(tuple(f"{note} Else what is solved is saved dense." for note in notes), screen)
            if not stream and any(one.quantize for one in final.layers.values()):
                need_compressed_tensors()  # now, not after the work
            job = SolveJob(choice, loaded, final, chosen, drawn, settings, held, stream, target, dense, tuner)
            result = job.run(screen)
        saved = job.save(output, force, result, screen) if ranks.rank == 0 else None
    if saved is not None:
        record_of(output).unlink(missing_ok=True)
        show_solved(job, result, saved, search, screen)


def _reads_data(context: typer.Context, solver: "Solver", method: Any, tuner: object) -> bool:
    """Whether solver, method (None: a plan is given) or tuner looks at calibration data; options that nothing reads are refused."""
    if tuner is not None:
        return True
    if solver.needs == "none":
        refuse(context, f"since solver {solver.name} looks at weights alone", "propagate")
    if solver.needs != "none" or (method is not None and method.needs_data):
        return True
    who, s = (
        (f"solver {solver.name}", "s") if method is None else (f"method {method.name} and solver {solver.name}", "")
    )
    refuse(context, f"since {who} look{s} at weights alone", *CALIBRATION, "spill")
    if solver.name != "random" and not getattr(method, "draws", hasattr(method, "seed")):
        refuse(context, f"since {who} draw{s} nothing", "seed")
    return False
