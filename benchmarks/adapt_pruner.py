"""Fewer heads, channels and blocks: perplexity of Adapt-Pruner beside its baselines, without and with equal training, and what runs faster.

    python benchmarks/adapt_pruner.py --bed FOLDER --work /tmp/adapt_pruner

Every method cuts to the same share of the whole model's parameters, FLAP's biases counted (rows of FLAP measured before they were have
up to 0.2 % more parameters, as they say). Training is full fine-tuning beside the dense model (`Recovery`), the same steps for each;
"accel" is Adapt-Accel: the same steps in stages. Speed is measured on the cut, untrained model in the same run as the dense one:
decoding a token at batch 1 behind 64 others, and a prefill of 512. Every cell is written as soon as it is measured. With `--minutes`
training is by the clock instead, for accel all stages together.
"""

import argparse
import itertools
import os
import statistics
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
from layerwise.errors import LayerwiseError
from layerwise.methods.adapt_accel import adapt_accel
from layerwise.recover import Recovery
from layerwise.shrink import apply
from layerwise.tasks import text
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
ACCEL = "accel"  # in the place of a method
METHODS = f"random-width,magnitude-width,llm-pruner,flap,shortgpt,adapt-pruner,{ACCEL}"
TIMED = -1  # in the place of a number of steps: as many as the minutes allow


@dataclass(frozen=True)
class Cell:
    """One row. steps: of training, 0 for none."""

    model: str
    share: float = 1.0
    method: str = "dense"
    steps: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo,smollm2")
    add_device(parser)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--shares", default="0.8,0.7,0.5", help="of the parameters that are kept")
    parser.add_argument("--steps", type=int, default=40, help="of training; 0: none")
    parser.add_argument("--minutes", type=float, help="of training, in the place of steps")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--training-text", help="file in the bed's folder of texts (default: the calibration text)")
    parser.add_argument("--stages", type=int, default=4, help="of accel")
    parser.add_argument("--step", type=float, default=0.02, help="of Adapt-Pruner's schedule")
    parser.add_argument("--samples", type=int, default=32, help="that pruning looks at")
    parser.add_argument("--windows", type=int, default=512, help="that training draws from, 16 of them held out")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--lr", type=float, default=1e-3, help="of training")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32",), default="float32")
    parser.add_argument("--cut-only", action="store_true", help="measure no training yet: a later run goes on")
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/adapt_pruner.md")
    options = parser.parse_args()
    options.steps = TIMED if options.minutes else options.steps
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, shown = Lines(options.out.with_suffix(".jsonl")), {}
    for subject in subjects(options):
        settings = ("batch", "windows", "lr", "stages", "step")
        protocol = {**protocol_of(subject, options), **{name: getattr(options, name) for name in settings}}
        if options.minutes:
            protocol |= {name: getattr(options, name) for name in ("minutes", "precision", "training_text")}
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
    """Each cell from the dense weights anew."""
    windows = subject.evaluation(options.tokens, options.length)
    calibration = batches(subject.calibration(options.samples, options.length, 0), options.batch)
    ids = drawn(subject, options)
    train, judged = batches(ids[16:], options.batch), batches(ids[:16], options.batch)
    dense = lw.load(subject.folder, dtype="float32", device=options.device)

    def missing(cell: Cell) -> bool:
        return not results.of(**asdict(cell), protocol=protocol)

    if missing(Cell(subject.name)):
        speed = speeds(dense, dense)
        yield Cell(subject.name), {"perplexity": perplexity(dense, windows), **speed, "parameters": size(dense)}
    names = options.methods.split(",")
    for share, name in itertools.product(map(float, options.shares.split(",")), names):
        plain, trained = Cell(subject.name, share, name), Cell(subject.name, share, name, options.steps)
        possible = [plain] * (name != ACCEL) + [trained] * (options.steps != 0 and not options.cut_only)
        wanted = [cell for cell in possible if missing(cell)]
        if not wanted:
            continue
        model, started = lw.load(subject.folder, dtype="float32", device=options.device), time.perf_counter()
        if name == ACCEL:
            with tempfile.TemporaryDirectory() as work:
                done = adapt_accel(
                    model, method_of("adapt-pruner", share, options), calibration, train, judged,
                    recovery=recovery_of(options, looks=8), stages=options.stages, work=work, teacher=dense,
                )  # fmt: skip
            row = {"seconds": time.perf_counter() - started, "steps": sum(stage.steps for stage in done.stages)}
            yield trained, {"perplexity": perplexity(model, windows), **row, "parameters": size(model)}
            continue
        try:
            apply(model, method_of(name, share, options).plan(model, calibration), calibration)
        except LayerwiseError as error:
            for cell in wanted:
                yield cell, {"error": str(error)}
            continue
        row = {"seconds": time.perf_counter() - started, "parameters": size(model)}
        if plain in wanted:
            yield plain, {"perplexity": perplexity(model, windows), **row, **speeds(dense, model)}
        if trained in wanted:
            with tempfile.TemporaryDirectory() as work:
                found = recovery_of(options, looks=4).train(model, train, judged, teacher=dense, work=work)
            row = {"seconds": time.perf_counter() - started, "steps": found.steps, "parameters": size(model)}
            yield trained, {"perplexity": perplexity(model, windows), **row}


def drawn(subject: Subject, options: argparse.Namespace) -> torch.Tensor:
    """Windows to train on, the first 16 to judge by."""
    if options.training_text is None:
        return subject.calibration(options.windows, options.length, 1)
    source = subject.bed / "text" / options.training_text
    found = text(source, subject.tokenizer, samples=options.windows, length=options.length, seed=1)
    return torch.cat([batch["input_ids"] for batch in found])


def recovery_of(options: argparse.Namespace, looks: int) -> Recovery:
    if options.minutes:
        return Recovery(minutes=options.minutes, lr=options.lr, looks=looks, precision=options.precision)
    return Recovery(steps=options.steps, lr=options.lr, looks=looks, precision=options.precision)


def method_of(name: str, share: float, options: argparse.Namespace) -> lw.methods.Method:
    name, _, given = name.partition(":")
    own: dict[str, Any] = dict(setting.split("=") for setting in given.split(":") if setting)
    if "reference" in own:
        own["reference"] = True
    if name == "adapt-pruner":
        own["step"] = options.step
        own["amplitude"] = options.step
    return lw.methods.method_from(name, parameters=share, **own)


def batches(ids: torch.Tensor, count: int) -> lw.Batches:
    return lw.Batches(tuple({"input_ids": part} for part in ids.split(count)), {"tokens": ids.numel()})


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def speeds(dense: nn.Module, model: nn.Module) -> dict[str, float]:
    """Milliseconds of a prefill of 512 tokens and of decoding one behind 64, the median of turns that both take; and the dense ones."""
    ids = (torch.arange(512)[None] % 1000 + 3).to(next(dense.parameters()).device)
    found: dict[str, float] = {}
    for name, run in (("prefill", prefill), ("decode", decode)):
        times: dict[str, list[float]] = {"": [], "dense_": []}
        for turn in range(8):
            for which, one in (("", model), ("dense_", dense)):
                spent = run(one, ids)
                if turn:  # the first warms up
                    times[which].append(spent)
        found |= {f"{which}{name}": 1000 * statistics.median(one) for which, one in times.items()}
    return found


def prefill(model: nn.Module, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    wait(ids)
    return time.perf_counter() - started


def decode(model: nn.Module, ids: torch.Tensor) -> float:
    cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
    wait(ids)
    started = time.perf_counter()
    for place in range(64, 72):
        cache = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values
    wait(ids)
    return (time.perf_counter() - started) / 8


def wait(ids: torch.Tensor) -> None:
    """Until the accelerator has done what it was asked for."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)


def report(results: Lines, shown: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    yield "# Fewer heads, channels and blocks: Adapt-Pruner beside its baselines"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    amount = f"{options.minutes:g} minutes in steps" if options.minutes else f"{options.steps} steps"
    read = f" of {options.training_text}" if options.training_text else ""
    yield (
        f"Protocol: float32; pruning looks at {options.samples} x {options.length} tokens; training ({options.precision}): {amount} of"
        f" {options.batch} windows, lr {options.lr:g}, half of the loss from the dense model, {options.windows - 16} windows{read} to draw"
        f" from, one seed; Adapt-Pruner in steps of {options.step:g}; accel: {options.stages} stages in the same training. Perplexity on"
        f" up to {options.tokens} held-out tokens in windows of {options.length}. Speed: times the dense model's, in the same run, on a"
        " machine that others load: take it as about."
    )
    share_names = [float(one) for one in options.shares.split(",")]
    for model, protocol in shown.items():
        first = results.of(protocol=protocol, model=model, method="dense")[0]
        yield from ["", f"## {model}", "", f"Dense: {first['perplexity']:.2f}, {first['parameters']:,} parameters.", ""]
        heads = [f"{share:.0%}" for share in share_names]
        yield f"| method | {' | '.join(f'{one} kept | trained' for one in heads)} | decode | prefill | bytes |"
        yield f"|---|{'--:|--:|' * len(heads)}--:|--:|--:|"
        for name in options.methods.split(","):
            cells = []
            for share in share_names:
                for steps in (0, options.steps):
                    rows = results.of(protocol=protocol, model=model, share=share, method=name, steps=steps)
                    cells.append(figure(rows))
            last = results.of(protocol=protocol, model=model, share=share_names[-1], method=name, steps=0)
            yield f"| {name} | {' | '.join(cells)} | {' | '.join(ratios(last, first))} |"
        yield ""
        yield f"Speed and bytes: at {heads[-1]}, over the dense model's."


def figure(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    return "cannot" if "error" in rows[0] else f"{rows[0]['perplexity']:.2f}"


def ratios(rows: list[dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    if not rows or "error" in rows[0]:
        return ["", "", ""]
    row = rows[0]
    times = [f"{row[f'dense_{name}'] / row[name]:.2f} x faster" for name in ("decode", "prefill")]
    return [*times, f"{row['parameters'] / dense['parameters']:.2f}"]


if __name__ == "__main__":
    main()
