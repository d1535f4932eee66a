"""What block-wise reconstruction wins back, beside nothing and beside full fine-tuning that is given the same seconds.

    python benchmarks/reconstruct.py --bed FOLDER --work /tmp/reconstruct

Every form (60 %, 70 %, 2:4 under Wanda and SparseGPT; 3 bits by rounding and GPTQ) is solved, then solved with `Reconstruction`, then
solved and trained whole (`Recovery` with the dense model as its teacher, masks held) for as long as reconstruction took beyond the
solver. Quantized weights are not trained whole: their codes would not stay. Training sees windows of the same text as calibration,
as many as it has time for; reconstruction sees the calibration windows alone. Every cell is written as soon as it is measured.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise as lw
from allocation import protocol_of
from bed import Subject, add_arguments, add_device, perplexity, subjects
from layerwise.recover import Reconstruction, Recovery, masks_of
from layerwise.recover.dtypes import cast
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
FORMS = {
    "60 %": lambda: lw.methods.Uniform(sparsity=0.6),
    "70 %": lambda: lw.methods.Uniform(sparsity=0.7),
    "2:4": lambda: lw.methods.Uniform(sparsity=0.5, pattern="2:4"),
    "3 bits": lambda: lw.methods.UniformBits(bits=3, group=64),
}
SOLVERS = {
    "wanda": lw.solvers.Wanda,
    "sparsegpt": lw.solvers.SparseGPT,
    "round_to_nearest": lw.solvers.RoundToNearest,
    "gptq": lw.solvers.GPTQ,
}
PAIRS = [
    (form, solver) for form in FORMS for solver in SOLVERS if ("bits" in form) == (solver not in ("wanda", "sparsegpt"))
]


@dataclass(frozen=True)
class Cell:
    """One row: how the model was compressed, and how it was won back ("dense": neither)."""

    model: str
    form: str = ""
    solver: str = ""
    recovery: str = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo,smollm2")
    add_device(parser)
    parser.add_argument("--pairs", default=",".join(f"{form}/{solver}" for form, solver in PAIRS), help="FORM/SOLVER,…")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="samples in one step, of both kinds")
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens")
    parser.add_argument("--epochs", type=int, default=Reconstruction.epochs)
    parser.add_argument("--lr", type=float, default=Reconstruction.lr, help="of reconstruction")
    parser.add_argument("--targets", default="dense", help="of reconstruction: dense, same")
    parser.add_argument("--full-lr", type=float, default=1e-3, help="of full fine-tuning")
    parser.add_argument(
        "--windows", type=int, default=256, help="that full fine-tuning draws from, 16 of them held out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/reconstruct.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, shown = Lines(options.out.with_suffix(".jsonl")), {}
    for subject in subjects(options):
        protocol = {
            **protocol_of(subject, options),
            **{name: getattr(options, name) for name in ("batch", "epochs", "lr", "full_lr", "windows", "seed")},
        }
        shown[subject.name] = protocol
        for cell, row in () if options.report else measured(subject, options, results, protocol):
            results.add({**asdict(cell), "protocol": protocol}, row)
            print(" ".join(str(part) for part in asdict(cell).values()), row, file=sys.stderr, flush=True)
    text = "\n".join(report(results, shown, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def measured(
    subject: Subject, options: argparse.Namespace, results: Lines, protocol: dict[str, Any]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell from the dense weights anew; how long training may take is known from reconstruction's row."""

    def row_of(cell: Cell) -> dict[str, Any] | None:
        return next(iter(results.of(**asdict(cell), protocol=protocol)), None)

    dense = lw.load(subject.folder, dtype=options.dtype, device=options.device)
    windows = subject.evaluation(options.tokens, options.length)
    data = batches(subject.calibration(options.samples, options.length, options.seed), options.batch)
    if row_of(Cell(subject.name)) is None:
        yield Cell(subject.name), {"perplexity": perplexity(dense, windows)}
    for form, solver in (pair.split("/") for pair in options.pairs.split(",")):
        plain = Cell(subject.name, form, solver, "none")
        if row_of(plain) is None:
            model = copy.deepcopy(dense)
            yield plain, compressed(model, form, solver, data) | {"perplexity": perplexity(model, windows)}
        for target in options.targets.split(","):
            tuned = Cell(subject.name, form, solver, f"blocks, {target}")
            if row_of(tuned) is None:
                model = copy.deepcopy(dense)
                tuner = Reconstruction(epochs=options.epochs, lr=options.lr, target=target, seed=options.seed)
                yield tuned, compressed(model, form, solver, data, tuner) | {"perplexity": perplexity(model, windows)}
        full = Cell(subject.name, form, solver, "whole")
        if "bits" not in form and row_of(full) is None:
            first = row_of(Cell(subject.name, form, solver, f"blocks, {options.targets.split(',')[0]}"))
            before = row_of(plain)
            model = copy.deepcopy(dense)
            compressed(model, form, solver, data)
            spare = max(1.0, first["seconds"] - before["seconds"]) if first and before else 1.0
            yield full, trained(model, dense, subject, spare, options) | {"perplexity": perplexity(model, windows)}


def batches(ids: torch.Tensor, size: int) -> lw.Batches:
    return lw.Batches(tuple({"input_ids": part} for part in ids.split(size)), {"tokens": ids.numel()})


def compressed(
    model: nn.Module, form: str, solver: str, data: lw.Batches, tuner: Reconstruction | None = None
) -> dict[str, Any]:
    started = time.perf_counter()
    result = lw.compress(model, FORMS[form]().plan(model), solver=SOLVERS[solver](), data=data, tuner=tuner)
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "sparsity": result.sparsity, "bits": result.bits}
    if tuner is not None:
        row["tuning"] = result.seconds["tune"]
        row["error"] = [
            sum(getattr(one, which) for one in result.tuned) / len(result.tuned) for which in ("before", "after")
        ]
        row["left"] = sum(1 for one in result.tuned if one.note)
    return row


def trained(
    model: nn.Module, teacher: nn.Module, subject: Subject, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Full masked fine-tuning for so many seconds, what it measures by the way included."""
    ids = subject.calibration(options.windows, options.length, options.seed + 1)
    started, stored = time.perf_counter(), next(model.parameters()).dtype
    model.float()  # small steps are lost in bfloat16 weights
    with tempfile.TemporaryDirectory() as work:
        recovery = Recovery(minutes=seconds / 60, lr=options.full_lr, looks=3, seed=options.seed)
        found = recovery.train(
            model,
            batches(ids[:-16], options.batch),
            batches(ids[-16:], options.batch),
            work=work,
            teacher=teacher,
            keep=masks_of(model),
        )
    cast(model, stored)
    return {"seconds": time.perf_counter() - started, "steps": found.steps, "best": found.best, "leaked": found.leaked}


def report(results: Lines, shown: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    yield "# Block-wise reconstruction beside nothing and full fine-tuning"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {options.dtype}; {options.samples} x {options.length} calibration tokens, {options.batch} samples a step,"
        f" {options.epochs} epochs, lr {options.lr:g} (scales {Reconstruction.ratio_lr:g}); whole: lr {options.full_lr:g}, half of the"
        f" loss from the dense model, the seconds of reconstruction, {options.windows} windows to draw from; one seed. Perplexity on up to"
        f" {options.tokens} held-out tokens in windows of {options.length}. Seconds: beyond the solver's own; of other machines' loads"
        " they are not free."
    )
    names = [*(f"blocks, {target}" for target in options.targets.split(",")), "whole"]
    for model, protocol in shown.items():
        dense = results.of(protocol=protocol, model=model, recovery="dense")[0]["perplexity"]
        yield from ["", f"## {model}", "", f"Dense: {dense:.2f}. Weights {protocol['weights']}.", ""]
        yield f"| form | solver | none | {' | '.join(names)} | seconds | block error | steps of whole |"
        yield f"|---|---|--:|{'--:|' * len(names)}--:|--:|--:|"
        for form, solver in (pair.split("/") for pair in options.pairs.split(",")):
            rows = {
                name: next(
                    iter(results.of(protocol=protocol, model=model, form=form, solver=solver, recovery=name)), None
                )
                for name in ("none", *names)
            }
            first, plain, whole = rows[names[0]], rows["none"], rows["whole"]
            if first is None or plain is None:
                continue
            figures = [f"{row['perplexity']:.2f}" if row else "" for row in rows.values()]
            error = " to ".join(f"{one:.3f}" for one in first["error"])
            steps = f"{whole['steps']}" if whole else ""
            yield (
                f"| {form} | {solver} | {' | '.join(figures)} | {first['seconds'] - plain['seconds']:.0f} | {error} | {steps} |"
            )


if __name__ == "__main__":
    main()
