"""How a sparsity budget should be spread: every allocation under magnitude, Wanda and SparseGPT, judged by perplexity.

    python benchmarks/allocation.py --bed FOLDER --work /tmp/allocation

Every cell (model, sparsity, allocation, solver, seed) is written to a file as soon as it is done, so a run that was killed goes on
where it stopped. The seed draws the calibration windows and the random allocation. See README.md for the protocol.
"""

import argparse
import hashlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import layerwise as lw
from bed import Subject, add_arguments, add_device, perplexity, subjects
from layerwise.errors import LayerwiseError
from layerwise.scores import alphas_kept
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
BATCH = 4  # samples in one forward pass of calibration

# names in layerwise.methods, each with settings of its own after a colon
ALLOCATIONS = "uniform,random,erk,owl,alpha-pruning,farms,ecoflap,ecoflap:order=first,snip"
SOLVERS = {"magnitude": lw.solvers.Magnitude, "wanda": lw.solvers.Wanda, "sparsegpt": lw.solvers.SparseGPT}


@dataclass(frozen=True)
class Cell:
    """One number of the table. The dense model has no sparsity, no solver and no seed."""

    model: str
    sparsity: float = 0.0
    allocation: str = "dense"
    solver: str = ""
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="stories260k,demo,smollm2")
    add_device(parser)
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--allocations", default=ALLOCATIONS)
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--only-seed", type=int, help="measure this one alone: several processes share the work")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens, in windows of --length")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 4 x 128 tokens, 4096 held-out tokens, small models"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/allocation.md")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.samples, options.length, options.tokens = 1, 4, 128, 4096
        options.models = ",".join(name for name in options.models.split(",") if name != "smollm2")
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    results = Lines(options.out.with_suffix(".jsonl"))
    shown = {}
    for subject in subjects(options):
        protocol = protocol_of(subject, options)
        shown[subject.name] = protocol
        missing = [cell for cell in cells(subject.name, options) if key_of(cell, protocol) not in results]
        if options.report:
            missing = []
        with alphas_kept(options.work / "alphas"):  # they depend on the weights alone
            for cell, row in measured(subject, missing, options):
                results.add(key_of(cell, protocol), row)
                said = row.get("error") or f"perplexity {row['perplexity']:.3f}"
                print(f"{' '.join(str(part) for part in asdict(cell).values())}: {said}", file=sys.stderr, flush=True)
    text = "\n".join(report(results, shown, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    draw(results, shown, options)
    print(text)


def key_of(cell: Cell, protocol: dict[str, Any]) -> dict[str, Any]:
    return {**asdict(cell), "protocol": protocol}


def protocol_of(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """What a number depends on beside its cell; results under another protocol are left alone and measured anew."""
    weights = hashlib.sha256()
    for file in sorted(subject.folder.glob("*.safetensors")):
        weights.update(file.read_bytes())
    return {
        "weights": weights.hexdigest()[:12],
        "calibration": [options.samples, options.length],
        "evaluated": [options.tokens, options.length],
        "dtype": options.dtype,
        "layerwise": lw.__version__,
        "torch": torch.__version__,
    }


def cells(model: str, options: argparse.Namespace) -> Iterator[Cell]:
    """Seeds vary first, so that a run cut short has whole ones; solvers last, so that they share a plan."""
    yield Cell(model)
    for seed in range(options.seeds) if options.only_seed is None else [options.only_seed]:
        for sparsity in map(float, options.sparsities.split(",")):
            for allocation in options.allocations.split(","):
                for solver in options.solvers.split(","):
                    if seed == 0 or draws(allocation, solver):
                        yield Cell(model, sparsity, allocation, solver, seed)


def draws(allocation: str, solver: str) -> bool:
    """Whether the seed matters: calibration data is looked at, or something is drawn at random."""
    method = lw.methods.METHODS[allocation.partition(":")[0]]
    seeded = any(field.name == "seed" for field in fields(method))
    return seeded or method.needs_data or SOLVERS[solver].needs != "none"


def method_of(cell: Cell) -> lw.methods.Method:
    """The method at its defaults, but for the budget and, where it draws, the seed."""
    name, _, given = cell.allocation.partition(":")
    names = {field.name for field in fields(lw.methods.METHODS[name])}
    own = dict(setting.split("=") for setting in given.split(":") if setting)
    seed = {"seed": cell.seed} if "seed" in names else {}
    return lw.methods.method_from(name, sparsity=cell.sparsity, **seed, **own)


def measured(
    subject: Subject, missing: list[Cell], options: argparse.Namespace
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell from the dense weights anew. A method that cannot do what the cell asks is a row too."""
    if not missing:
        return
    model = lw.load(subject.folder, dtype=options.dtype, device=options.device)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    windows = subject.evaluation(options.tokens, options.length)

    @cache
    def data(seed: int) -> lw.Batches:
        return batches(subject.calibration(options.samples, options.length, seed), seed)

    known = Lines(options.work / f"scores_{subject.name}.jsonl")  # of ECoFLaP: they serve every sparsity

    @lru_cache(maxsize=1)
    def plan(method: lw.methods.Method, allocation: str, seed: int) -> lw.Plan:
        if not isinstance(method, lw.methods.ECoFLaP):
            return method.plan(model, data(seed))
        exact = method.order == "zeroth"  # whose losses half precision would bury in its rounding
        dtype = "float32" if exact else options.dtype
        key = {"allocation": allocation, "seed": seed, "scored in": dtype, "protocol": protocol_of(subject, options)}
        if key not in known:
            scored = lw.load(subject.folder, dtype=dtype, device=options.device) if exact else model
            known.add(key, method.plan(scored, data(seed)).scores)
        return method.plan(model, data(seed), scores=known[key])

    for cell in missing:
        model.load_state_dict(dense)
        started = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            if cell.allocation != "dense":
                chosen = plan(method_of(cell), cell.allocation, cell.seed)
                result = lw.compress(model, chosen, solver=SOLVERS[cell.solver](), data=data(cell.seed))
                shares = [treatments.prune.sparsity for treatments in chosen.layers.values() if treatments.prune]
                row = {"sparsity": result.sparsity, "lowest": min(shares), "highest": max(shares)}
                row["notes"] = list(result.notes)
            row |= {"seconds": time.perf_counter() - started, "perplexity": perplexity(model, windows)}
        except LayerwiseError as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        yield cell, row


def batches(ids: Tensor, seed: int) -> lw.Batches:
    return lw.Batches(tuple({"input_ids": part} for part in ids.split(BATCH)), {"seed": seed, "tokens": ids.numel()})


def report(results: Lines, shown: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    yield "# Allocation: where the zeros should go"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {options.dtype}, losses and ECoFLaP's zeroth-order scores in float32;"
        f" {options.samples} x {options.length} calibration tokens drawn per seed, {options.seeds} seeds;"
        f" perplexity on up to {options.tokens} held-out tokens in windows of {options.length}, mean ± standard deviation"
        " over seeds (no deviation where neither data nor chance enters). Sparsity counts the matrices of the blocks."
        " Texts: README.md."
    )
    sparsities = [float(one) for one in options.sparsities.split(",")]
    for model, protocol in shown.items():
        dense = results.of(protocol=protocol, model=model, allocation="dense")[0]["perplexity"]
        yield from ["", f"## {model}", "", f"Dense: {dense:.3f}. Weights {protocol['weights']}.", ""]
        yield f"| solver | allocation | {' | '.join(f'{one:.0%}' for one in sparsities)} |"
        yield f"|---|---|{'--:|' * len(sparsities)}"
        for solver in options.solvers.split(","):
            for allocation in options.allocations.split(","):
                found = [
                    results.of(protocol=protocol, model=model, sparsity=one, allocation=allocation, solver=solver)
                    for one in sparsities
                ]
                yield f"| {solver} | {allocation} | {' | '.join(mean_deviation(rows) for rows in found)} |"
    errors = sorted(
        {row["error"] for protocol in shown.values() for row in results.of(protocol=protocol) if "error" in row}
    )
    yield from ["", *(f"- failed: {error}" for error in errors)]


def draw(results: Lines, shown: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """One panel for each model and solver: perplexity over that of uniform at the same sparsity, mean over seeds, log scale."""
    from matplotlib.figure import Figure

    solvers, sparsities = options.solvers.split(","), [float(one) for one in options.sparsities.split(",")]
    figure = Figure(figsize=(1 + 3.2 * len(solvers), 0.6 + 2.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(solvers), squeeze=False, sharex=True)
    for row, (model, protocol) in zip(panels, shown.items(), strict=True):
        for panel, solver in zip(row, solvers, strict=True):
            for allocation in options.allocations.split(","):
                means = {}
                for name in ("uniform", allocation):
                    found = [
                        results.of(protocol=protocol, model=model, sparsity=one, allocation=name, solver=solver)
                        for one in sparsities
                    ]
                    values = [[cell["perplexity"] for cell in cells if "perplexity" in cell] for cells in found]
                    means[name] = [statistics.fmean(some) if some else math.nan for some in values]
                ratios = [mine / uniform for mine, uniform in zip(means[allocation], means["uniform"], strict=True)]
                panel.plot(sparsities, ratios, marker="o", markersize=3, linewidth=1.2, label=allocation)
            panel.set_yscale("log")
            for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis(lambda ratio, _: f"{ratio:g}x")
            panel.set_xticks(sparsities, [f"{one:.0%}" for one in sparsities])
            panel.set_title(f"{model}, {solver}", fontsize=9)
    figure.supylabel("perplexity / that of uniform", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(options.out.with_suffix(".png"), dpi=110)


def mean_deviation(rows: list[dict[str, Any]]) -> str:
    """ "12.34 ± 0.56"; four significant digits, since perplexities span decades."""
    if not rows:
        return "not run"
    values = [row["perplexity"] for row in rows if "perplexity" in row]
    if len(values) < len(rows) or not values:
        return "failed"
    mean = statistics.fmean(values)
    digits = max(0, 3 - math.floor(math.log10(mean)))
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
