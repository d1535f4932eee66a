"""ECoFLaP's zeroth-order score: evaluations per second beside whole forward passes, and how well it ranks layers as draws grow.

    python benchmarks/ecoflap.py --bed FOLDER --work /tmp/ecoflap

Speed is measured on one layer of every block of a deep model, the rank on every layer of the demo model. See README.md for the protocol.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise as lw
from bed import Subject, add_arguments, subjects
from layerwise.randomness import generator_for
from layerwise.scores import central_slope, first_order_gradient, norm_from_slopes, zeroth_order_gradient
from layerwise.scores.zeroth_order import HALF_FACTOR
from layerwise.structure import groups_of, parameter_of
from layerwise.tasks import loss_of
from measuring import machine

HERE = Path(__file__).parent
STEP = 0.02
Scores = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="smollm2")
    parser.add_argument("--batch", type=int, default=4, help="samples in the one batch that speed is measured on")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of every side, taking turns")
    parser.add_argument("--draws", default="1,2,4,8", help="directions per batch, for the ranks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/ecoflap.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    speeds = {subject.name: speed(subject, options) for subject in subjects(options)}
    options.models = "demo"
    demo = subjects(options)[0]
    found = {"speed": speeds, "rank": rank(demo, options), "steps": steps(demo, options), "load": load}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(report(found, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def speed(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every side for the same layers, batch and directions; the recording pass counts."""
    model = subject.load()
    data = lw.Batches(({"input_ids": subject.calibration(options.batch, options.length, None)},), {})
    blocks = lw.structure_of(model).blocks
    names = [block.layers[index % len(block.layers)].name for index, block in enumerate(blocks)]
    structure = lw.structure_of(model, include=names)
    sides: dict[str, Callable[[], Scores]] = {
        "two whole passes": lambda: naive(model, data, structure),
        "from the block on": lambda: zeroth_order_gradient(model, data, structure, step=STEP, tail="exact"),
        "from the block on, tail once": lambda: zeroth_order_gradient(model, data, structure, step=STEP),
    }
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    scores: dict[str, Scores] = {}
    naive(model, data, lw.structure_of(model, include=names[:1]))  # warm-up
    for _ in range(options.repeats):
        for side, run in sides.items():
            wall, work = time.perf_counter(), time.process_time()
            scores[side] = run()
            taken[side].append((time.perf_counter() - wall, time.process_time() - work))
    return {
        "blocks": len(blocks),
        "evaluations": 2 * len(names),
        "tokens": options.batch * options.length,
        "seconds": {side: [wall for wall, _ in runs] for side, runs in taken.items()},
        "cpu_seconds": {side: [work for _, work in runs] for side, runs in taken.items()},
        "scores": scores,
    }


@torch.no_grad()
def naive(model: nn.Module, data: lw.Batches, structure: lw.Structure) -> Scores:
    """The same estimate by whole forward passes of the plain model, along the same directions."""
    scores = {}
    for layer in structure:
        weight, losses = parameter_of(model, layer), []
        kept = weight.data
        size = STEP * float(kept.square().mean().sqrt())
        z = torch.randn(layer.shape, generator=generator_for(0, f"zeroth-order:{layer.name}:0:0"))
        for sign in (1, -1):
            weight.data = kept + sign * size * z
            losses.append(float(loss_of(model, data[0])))
        weight.data = kept
        scores[layer.name] = norm_from_slopes([central_slope(*losses, size)])
    return scores


def rank(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Spearman's correlation with exact gradient norms, over layers and over blocks, as the directions grow."""
    model, data = subject.load(), pieces(subject, options)
    structure = lw.structure_of(model)
    exact = first_order_gradient(model, data, structure, kind="norm")
    rows = []
    for draws in map(int, options.draws.split(",")):
        for tail in ("linear", "exact"):
            if tail == "exact" and draws > 2:
                continue
            started = time.perf_counter()
            got = zeroth_order_gradient(model, data, structure, step=STEP, draws=draws, tail=tail)  # type: ignore[arg-type]
            rows.append(
                {
                    "directions": draws * len(data),
                    "tail": tail,
                    "layers": spearman(got, exact),
                    "blocks": spearman(by_block(got, structure), by_block(exact, structure)),
                    "error": statistics.fmean(abs(got[name] / exact[name] - 1) for name in exact),
                    "seconds": time.perf_counter() - started,
                }
            )
    first = first_order_gradient(model, data, structure)
    beside = {
        "layers": spearman(first, exact),
        "blocks": spearman(by_block(first, structure), by_block(exact, structure)),
    }
    return {"batches": [len(data), 2, options.length], "layers": len(exact), "rows": rows, "first_order": beside}


def steps(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean quotient and mean relative error beside exact norms in float32, by the dtype of the model and the size of the step."""
    model, data = subject.load(), pieces(subject, options)
    structure = lw.structure_of(model)
    exact = first_order_gradient(model, data, structure, kind="norm")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for step in (0.01, 0.02, 0.05, 0.1, 0.2):
            given = step / (HALF_FACTOR if dtype == torch.bfloat16 else 1)
            got = zeroth_order_gradient(model, data, structure, step=given, draws=2)
            quotients = [got[name] / exact[name] for name in exact]
            error = statistics.fmean(abs(one - 1) for one in quotients)
            rows.append({"dtype": str(dtype).removeprefix("torch."), "step": step, "error": error,
                         "quotient": statistics.fmean(quotients), "layers": spearman(got, exact)})  # fmt: skip
    return rows


def pieces(subject: Subject, options: argparse.Namespace) -> lw.Batches:
    """Four batches of two samples."""
    ids = subject.calibration(8, options.length, 0)
    return lw.Batches(tuple({"input_ids": part} for part in ids.split(2)), {})


def by_block(scores: Scores, structure: lw.Structure) -> Scores:
    return {name: sum(scores[layer.name] for layer in layers) for name, layers in groups_of(structure, "block").items()}


def spearman(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Pearson's correlation of ranks. Of equal scores the first comes first: scores are continuous."""
    names = list(a)
    places = [{name: place for place, name in enumerate(sorted(names, key=one.__getitem__))} for one in (a, b)]
    return statistics.correlation(*([place[name] for name in names] for place in places))


def report(found: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    yield "# ECoFLaP: the zeroth-order score"
    yield ""
    yield f"Machine: {machine()}; {options.threads} thread; load average before the run {found['load']:.1f}."
    yield f"layerwise {lw.__version__}, torch {torch.__version__}; float32; perturbation {STEP:.0%} of a layer's root mean square."
    for model, speeds in found["speed"].items():
        yield from [
            "",
            f"## Evaluations per second: {model}, {speeds['blocks']} blocks",
            "",
            f"One layer of every block (the roles in turn), one batch of {options.batch} x {options.length} tokens,"
            f" {speeds['evaluations']} evaluations of the loss, the recording pass counted. Median of {options.repeats} runs taking"
            " turns; CPU seconds, since other work shared the machine.",
            "",
            "| side | CPU s | wall s | evaluations per CPU s | times faster | score, median difference |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        base, plain = statistics.median(speeds["cpu_seconds"]["two whole passes"]), speeds["scores"]["two whole passes"]
        for side, runs in speeds["cpu_seconds"].items():
            seconds, wall = statistics.median(runs), statistics.median(speeds["seconds"][side])
            off = statistics.median(abs(speeds["scores"][side][name] / plain[name] - 1) for name in plain)
            rate = speeds["evaluations"] / seconds
            yield f"| {side} | {seconds:.2f} | {wall:.2f} | {rate:.2f} | {base / seconds:.2f} | {off:.2%} |"
    ranks = found["rank"]
    batches, rows, tokens = ranks["batches"]
    yield from [
        "",
        "## Rank correlation with exact gradient norms: demo",
        "",
        f"Spearman over {ranks['layers']} layers, and over blocks (scores summed), {batches} batches of {rows} x {tokens} tokens; mean"
        " relative error of a layer's score, which n directions leave at about 0.60 / sqrt(n).",
        "",
        "| directions per layer | tail | layers | blocks | error | 0.60 / sqrt(n) |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in ranks["rows"]:
        expected = MEAN_ERROR / math.sqrt(row["directions"])
        yield (
            f"| {row['directions']} | {row['tail']} | {row['layers']:.3f} | {row['blocks']:.3f} | {row['error']:.1%} | {expected:.1%} |"
        )
    first = ranks["first_order"]
    yield f"| first order, weight times gradient | | {first['layers']:.3f} | {first['blocks']:.3f} | | |"
    yield from [
        "",
        "## The size of the step: demo",
        "",
        "Score over exact norm in float32, mean over layers; mean relative error; rank correlation. 8 directions, the same in every row."
        f" The library's step is {STEP:g} of the root mean square, {STEP * HALF_FACTOR:g} in half precision.",
        "",
        "| model in | step | score / norm | error | layers |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in found["steps"]:
        yield f"| {row['dtype']} | {row['step']:g} | {row['quotient']:.3f} | {row['error']:.1%} | {row['layers']:.3f} |"


MEAN_ERROR = 0.7555 * math.sqrt(2 / math.pi)  # of a sum of many draws, nearly normal


if __name__ == "__main__":
    main()
