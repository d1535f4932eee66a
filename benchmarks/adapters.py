"""Adapters that leave zeros zero beside full masked fine-tuning: held-out loss after the same steps, numbers trained, seconds.

    python benchmarks/adapters.py --work /tmp/adapters

The demo model is pruned by Wanda to 60 % and trained beside its dense form. Every kind has the better of two learning rates, by the same
held-out loss, which flatters all of them alike. Every run is written as soon as it is done.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import layerwise as lw
from allocation import protocol_of
from bed import add_arguments, subjects
from layerwise.recover import Recovery, add_adapter, masks_of
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
RATES = {"full": (1e-3, 3e-3), "hira": (1e-2, 3e-2), "shira": (3e-3, 1e-2), "masked-lora": (1e-3, 3e-3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--ranks", default="8,16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/adapters.md")
    options = parser.parse_args()
    options.dtype = "float32"
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = Lines(options.out.with_suffix(".jsonl"))
    for subject in subjects(options):
        protocol = {**protocol_of(subject, options), "steps": options.steps, "sparsity": options.sparsity}
        dense = lw.load(subject.folder, dtype="float32")
        sparse = copy.deepcopy(dense)
        data = batches(subject.calibration(options.samples, options.length, 0))
        lw.compress(
            sparse, lw.methods.Uniform(sparsity=options.sparsity).plan(sparse), solver=lw.solvers.Wanda(), data=data
        )
        shown = batches(subject.calibration(4 * options.steps, options.length, 1))
        judged = batches(
            torch.stack(
                [one for one in subject.evaluation(options.tokens, options.length) if len(one) == options.length]
            )
        )
        for kind, rank, rate in wanted(options):
            key = {"model": subject.name, "kind": kind, "rank": rank, "rate": rate, "protocol": protocol}
            if key in results:
                continue
            model = copy.deepcopy(sparse)
            if kind != "full":
                add_adapter(model, kind, rank=rank)
            with tempfile.TemporaryDirectory() as work:
                found = Recovery(steps=options.steps, lr=rate, looks=2).train(
                    model, shown, judged, teacher=dense, keep=masks_of(model) if kind == "full" else None, work=work
                )
            row = {
                "before": found.before, "after": found.after, "seconds": found.seconds,
                "trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
            }  # fmt: skip
            results.add(key, row)
            print(kind, rank, rate, row, file=sys.stderr, flush=True)
        text = "\n".join(report(results, subject.name, protocol, options))
        options.out.write_text(text + "\n", encoding="utf-8")
        print(text)


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    for kind, rates in RATES.items():
        for rank in [0] if kind == "full" else map(int, options.ranks.split(",")):
            for rate in rates:
                yield kind, rank, rate


def batches(ids: torch.Tensor) -> lw.Batches:
    return lw.Batches(tuple({"input_ids": part} for part in ids.split(4)), {"tokens": ids.numel()})


def report(results: Lines, model: str, protocol: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    yield "# Adapters that leave zeros zero, beside full masked fine-tuning"
    yield ""
    yield f"Machine: {machine('cpu')}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {model}, {options.sparsity:.0%} of the blocks' matrices by Wanda; {options.steps} steps of 4 x {options.length} tokens"
        " in float32, half of the loss from the dense model; the better of two learning rates by the held-out loss that is shown; one seed."
        " Seconds are those of a machine that others load."
    )
    yield from [
        "",
        "| what is trained | rank | learning rate | numbers | held-out loss | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind in RATES:
        for rank in [0] if kind == "full" else map(int, options.ranks.split(",")):
            rows = [
                (row["after"], rate, row)
                for rate in RATES[kind]
                for row in results.of(model=model, kind=kind, rank=rank, rate=rate, protocol=protocol)
            ]
            if rows:
                after, rate, row = min(rows, key=lambda one: one[0])
                yield f"| {kind} | {rank or ''} | {rate:g} | {row['trained']:,} | {after:.4f} | {row['seconds']:.0f} |"
    before = next(iter(results.of(model=model, kind="full", protocol=protocol)), None)
    if before:
        yield from ["", f"Before: {before['before']:.4f}."]


if __name__ == "__main__":
    main()
