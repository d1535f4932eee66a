"""Exponents of layers: how much faster than the papers' recipe, and how much off.

    python benchmarks/farms.py --bed FOLDER --work /tmp/farms                 # --models '' for random matrices alone

The recipe takes the singular values of every window and tries one cut after the other (`naive_farms.py`). layerwise takes eigenvalues of
shared Gram matrices ("exact"), and on request of some of the windows only ("sample"). See README.md for the protocol.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import layerwise as lw
from bed import add_arguments, subjects
from layerwise.scores import Windows, fit_tail, window_spectrum
from layerwise.scores.spectra import blurred
from layerwise.structure import parameter_of
from measuring import machine
from naive_farms import Layout, naive

HERE = Path(__file__).parent
FITS = ("mid", "peak")
SAMPLES = (5, 3)
BLOCKS = 3  # of a model: the first, the middle one, the last


@dataclass(frozen=True)
class Case:
    """One matrix. most: windows that the recipe is timed on, None for all."""

    group: str
    name: str
    weight: Tensor
    layout: Layout
    most: int | None = None


@dataclass(frozen=True)
class Row:
    """One matrix and fit. Errors: of alpha, relative, None where not known. samples: windows along a side -> (seconds, error)."""

    group: str
    name: str
    shape: tuple[int, ...]
    fit: str
    windows: int
    measured: int  # windows the recipe was timed on; fewer than `windows` means extrapolated
    cuts: int
    naive_seconds: float
    exact_seconds: float
    alpha: float | None
    exact_error: float | None
    samples: dict[int, tuple[float, float | None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo,smollm2")
    parser.add_argument(
        "--sizes", default="512x512,1024x512,512x1536", help="random matrices, all windows of the recipe"
    )
    parser.add_argument(
        "--large", default="4096x4096", help="random and heavy-tailed, a few windows of it; '' for none"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/farms.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    load, rows = os.getloadavg()[0], []
    for case in cases(options):
        for row in measured(case):
            rows.append(row)
            print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    text = "\n".join(report(rows, options, load)) + "\n"
    options.out.write_text(text, encoding="utf-8")
    options.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    print(text)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Small matrices first, so that something is known soon."""
    sizes = [one for one in options.sizes.split(",") if one]
    for size in sizes:
        for kind in ("noise", "heavy"):
            yield Case(f"{size} {kind}", f"{size} {kind}", drawn(size, kind), Layout(256, 15))
    for subject in subjects(options) if options.models else []:
        model = lw.load(subject.folder, dtype="float32")
        blocks = lw.structure_of(model).blocks
        for block in sorted({0, len(blocks) // 2, len(blocks) - 1})[:BLOCKS]:
            for layer in blocks[block].layers:
                weight = parameter_of(model, layer).detach()
                size = f"{layer.rows}x{layer.columns}"
                yield Case(f"{subject.name} {size}", f"{subject.name} {layer.name}", weight, Layout(2000, 15))
    for size in [one for one in options.large.split(",") if one]:
        for kind in ("noise", "heavy"):
            yield Case(f"{size} {kind}", f"{size} {kind}", drawn(size, kind), Layout(2000, 15), most=3)


def drawn(size: str, kind: str) -> Tensor:
    """Independent normal entries, or Student's t with three degrees of freedom."""
    rows, columns = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "noise":
        return normal
    return normal / torch.randn(3, rows, columns, generator=generator).square().mean(0).sqrt()


def measured(case: Case) -> Iterator[Row]:
    """A row for each fit. Of a large matrix "peak" is timed on the larger sample, and its errors are not known."""
    windows = Windows(case.layout.rows, 1.0, case.layout.count)
    for fit in FITS:
        recipe = naive(case.weight, case.layout, fit, case.most)
        found = {sample: timed(case.weight, replace(windows, sample=sample), fit) for sample in SAMPLES}
        if case.most is None or fit == "mid":
            seconds, alpha = timed(case.weight, windows, fit)
            right = recipe.alpha if case.most is None else alpha
        else:
            seconds, alpha, right = found[SAMPLES[0]][0] * recipe.windows / SAMPLES[0] ** 2, None, None
        yield Row(
            case.group, case.name, tuple(case.weight.shape), fit, recipe.windows, recipe.measured, recipe.cuts, recipe.seconds, seconds,
            alpha, off(alpha, right), {sample: (took, off(value, right)) for sample, (took, value) in found.items()},
        )  # fmt: skip


def off(alpha: float | None, right: float | None) -> float | None:
    """Relative error, where it is known."""
    return None if alpha is None or right is None else abs(alpha / right - 1)


def timed(weight: Tensor, windows: Windows, fit: str) -> tuple[float, float]:
    """Seconds and alpha, as `layerwise.scores.alpha_hill` computes it."""
    began = time.process_time()
    values = window_spectrum(weight, windows, torch.float32 if fit == "mid" else torch.float64)
    if fit == "mid" and blurred(values):
        values = window_spectrum(weight, windows)
    alpha = fit_tail(values, fit).alpha
    return time.process_time() - began, alpha


def report(rows: list[Row], options: argparse.Namespace, load: float) -> Iterator[str]:
    yield "# Exponents of layers beside the papers' recipe"
    yield ""
    yield f"Machine: {machine()}; {options.threads} thread(s); load average before the run {load:.1f}."
    yield f"layerwise {lw.__version__}, torch {torch.__version__}. One run of each."
    yield ""
    yield "Recipe: float32 singular values of every window, one cut at a time. Exact: all windows. Sample k: k x k of them."
    yield "Seconds are those of the processor, not of the clock."
    yield "Columns: README.md. Error: of alpha, the largest of the group, in brackets the median."
    yield ""
    yield f"| matrices | fit | windows | recipe s | exact s | times | error | {' | '.join(f'sample {k}: times | error' for k in SAMPLES)} |"
    yield f"|---|---|--:|--:|--:|--:|--:|{'--:|--:|' * len(SAMPLES)}"
    for group, fit in dict.fromkeys((row.group, row.fit) for row in rows):
        yield line([row for row in rows if (row.group, row.fit) == (group, fit)])
    if partly := [row for row in rows if row.measured < row.windows]:
        yield ""
        yield (
            f"\\* the recipe was timed on {partly[0].measured} of {partly[0].windows} windows and on their cuts, and multiplied (windows"
            " by their number, the search by its square); so was exact for peak, from the larger sample. Errors of mid are against exact."
        )


def line(rows: list[Row]) -> str:
    recipe, exact = (sum(getattr(row, f"{side}_seconds") for row in rows) for side in ("naive", "exact"))
    star = "\\*" if rows[0].measured < rows[0].windows else ""
    cells = [
        f"{len(rows)} x {rows[0].group}" if len(rows) > 1 else rows[0].group, rows[0].fit, str(rows[0].windows),
        f"{recipe:.2f}{star}", f"{exact:.2f}", f"{recipe / exact:.1f}{star}",
        "–" if star else errors([row.exact_error for row in rows]),
    ]  # fmt: skip
    for sample in SAMPLES:
        cells.append(f"{recipe / sum(row.samples[sample][0] for row in rows):.1f}{star}")
        cells.append(errors([row.samples[sample][1] for row in rows]))
    return f"| {' | '.join(cells)} |"


def errors(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{max(known):.2%}" + (f" ({statistics.median(known):.2%})" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
