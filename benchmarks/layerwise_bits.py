"""Which layers should lose bits: perplexity against the number of blocks at 2 bits, by LIM, ZD, measured errors and chance.

    python benchmarks/layerwise_bits.py --bed FOLDER --work /tmp/layerwise_bits

The curve of Layer-Wise Quantization (Dumitru et al. 2024): all blocks start at the high level, and the last of an order go to the low
one. Every order has the same true bits at each point. `errors` and `divergence` are `least-error` by its two measures: it chooses
blocks, or spends the same bits on layers, with the two levels or with 3 bits between. Every cell is written as soon as it is measured,
so a run that was killed goes on.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise as lw
from allocation import batches, mean_deviation, protocol_of
from bed import Subject, add_arguments, add_device, perplexity, subjects
from layerwise.errors import LayerwiseError
from layerwise.methods.handing_out import dealt
from layerwise.solvers import solver_from
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
ORDERS = {
    "lim": {"score": "lim"},
    "zd": {"score": "zd"},
    "lim reversed": {"score": "lim", "reverse": True},
    "random": {"score": "random"},
}
MEASURED = {  # order -> settings of least-error, and whether 3 bits lie between
    "errors, blocks": ({"measure": "gradient", "granularity": "block"}, False),
    "errors, layers": ({"measure": "gradient", "granularity": "layer"}, False),
    "errors, layers, 3 bits too": ({"measure": "gradient", "granularity": "layer"}, True),
    "divergence, blocks": ({"measure": "divergence", "granularity": "block"}, False),
    "divergence, layers": ({"measure": "divergence", "granularity": "layer"}, False),
    "divergence, layers, 3 bits too": ({"measure": "divergence", "granularity": "layer"}, True),
}
# SmolLM2's weights lie on a 4-bit grid of groups of 32: at 4 bits it flatters that grid
CAVEATS = {
    "smollm2": "Stored on a 4-bit grid (groups of 32), so its dense weights are not full precision.",
    "smollm2-tuned": "Fine-tuned for 100 steps, which took its weights off the 4-bit grid that they were stored on (`tuned.py`).",
    "stories260k": "Groups do not divide 172 inputs (`down`): one scale for each row there.",
}


AS_UNIFORM = -1  # in the place of a number of low blocks: as many bits as all layers take at 3


@dataclass(frozen=True)
class Cell:
    """One number: the model in this order with `low` blocks at the low level (or as many bits as that). Only `random` has draws."""

    model: str
    solver: str = ""
    order: str = "dense"
    low: int = 0
    draw: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="stories260k,demo,smollm2")
    add_device(parser)
    parser.add_argument("--solvers", default="round_to_nearest,hqq,gptq")
    parser.add_argument("--high", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--points", type=int, default=6, help="numbers of low blocks, from none to all")
    parser.add_argument("--draws", type=int, default=5, help="random orders")
    parser.add_argument("--measured", default="errors,divergence", help="which of the two (the second takes hours)")
    parser.add_argument(
        "--probes", type=int, default=4, help="samples that divergences are measured on, a pass a level each"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens, in windows of --length")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/layerwise_bits.md")
    options = parser.parse_args()
    if not 3 < options.high <= 8:
        raise SystemExit(f"--high {options.high}: give 4 to 8; the low level is 2, and 3 lies between.")
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    results, shown = Lines(options.out.with_suffix(".jsonl")), {}
    for subject in subjects(options):
        bench = Bench(subject, options)
        shown[subject.name] = bench
        for cell in () if options.report else bench.cells():
            if bench.key(cell) not in results:
                row = bench.measured(cell)
                results.add(bench.key(cell), row)
                said = row.get("error") or f"{row['bits']:.3f} bits, perplexity {row['perplexity']:.3f}"
                print(f"{' '.join(str(part) for part in asdict(cell).values())}: {said}", file=sys.stderr, flush=True)
        bench.let_go()
    text = "\n".join(report(results, shown, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


class Bench:
    """One model with its texts. It is loaded when the first cell that is missing asks for it; errors are measured once a solver."""

    def __init__(self, subject: Subject, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        grid = {"levels": [2, options.high], "group": options.group, "probes": options.probes}
        self.protocol = {**protocol_of(subject, options), **grid}
        kinds = options.measured.split(",")
        self.measured_orders = [name for name in MEASURED if name.partition(",")[0] in kinds]
        self.freest = [name for name in self.measured_orders if MEASURED[name][1]]
        self.blocks = len(lw.structure_of(self._model()).blocks)
        self.errors = cache(self._errors)
        self.data = cache(self._data)
        self.budget = cache(self._budget)

    @cache  # noqa: B019  (let_go empties it)
    def _model(self) -> nn.Module:
        return lw.load(self.subject.folder, dtype=self.options.dtype, device=self.options.device)

    @cache  # noqa: B019
    def _dense(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self._model().state_dict().items()}

    def let_go(self) -> None:
        """The next model needs the memory."""
        for kept in (Bench._model, Bench._dense, self.errors, self.data):
            kept.cache_clear()

    def key(self, cell: Cell) -> dict[str, Any]:
        return {**asdict(cell), "protocol": self.protocol}

    def points(self) -> list[int]:
        """Numbers of low blocks, evenly from none to all."""
        most = max(1, min(self.options.points - 1, self.blocks))
        return [round(self.blocks * one / most) for one in range(most + 1)]

    def cells(self) -> Iterator[Cell]:
        yield Cell(self.subject.name)
        for solver in self.options.solvers.split(","):
            for low in self.points():
                # at both ends all orders are one
                ends = low in (0, self.blocks)
                for order in ["lim"] if ends else [*ORDERS, *self.measured_orders]:
                    for draw in range(self.options.draws if order == "random" else 1):
                        yield Cell(self.subject.name, solver, order, low, draw)
            yield from (Cell(self.subject.name, solver, order, AS_UNIFORM) for order in ("uniform 3", *self.freest))

    def measured(self, cell: Cell) -> dict[str, Any]:
        """From the dense weights anew. What cannot be made is a row too."""
        model = self._model()
        model.load_state_dict(self._dense())
        started = time.perf_counter()
        row: dict[str, Any] = {"bits": 32.0}
        try:
            if cell.order != "dense":
                plan = self.plan(cell)
                planned = time.perf_counter()
                solver = solver_from({"name": cell.solver})
                lw.compress(model, plan, solver=solver, data=self.data() if solver.needs != "none" else None)
                row = {
                    "bits": plan.budget.achieved_bits,
                    "nominal": plan.budget.nominal_bits,
                    "planning": planned - started,
                }
            windows = self.subject.evaluation(self.options.tokens, self.options.length)
            row |= {"seconds": time.perf_counter() - started, "perplexity": perplexity(model, windows)}
        except LayerwiseError as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        finally:
            model.load_state_dict(self._dense())
        return row

    def plan(self, cell: Cell) -> lw.Plan:
        grid = self.grid(cell.solver)
        levels = f"2,{self.options.high}"
        if cell.order == "uniform 3":
            return lw.methods.UniformBits(bits=3, **grid).plan(self._model())
        if cell.order in ORDERS:
            method = lw.methods.LWQ(
                bits=self.budget(cell.solver, cell.low), levels=levels, seed=cell.draw, **ORDERS[cell.order], **grid
            )
            return method.plan(self._model(), self.data())
        settings, three = MEASURED[cell.order]
        method = lw.methods.LeastError(
            bits=self.budget(cell.solver, cell.low), levels=f"2,3,{self.options.high}" if three else levels, solver=cell.solver,
            **settings, **grid,
        )  # fmt: skip
        hand = dealt(method, method, self._model(), None)
        return method.plan_by(
            self._model(), hand, *self.errors(cell.solver, settings["measure"], settings["granularity"])
        )

    def grid(self, solver: str) -> dict[str, Any]:
        """Settings of every plan for this solver: symmetric grids, or HQQ's, whose zeros are any numbers and take 16 bits."""
        free = solver == "hqq"
        return {"group": self.options.group, "indivisible": "row", "symmetric": not free, "shift": free}

    def _budget(self, solver: str, low: int) -> float:
        """True bits per weight with so many blocks at the low level; blocks of unequal size by the mean block."""
        grid = self.grid(solver)

        def uniform(bits: int) -> float:
            return lw.methods.UniformBits(bits=bits, **grid).plan(self._model()).budget.achieved_bits

        if low == AS_UNIFORM:
            return uniform(3)
        return uniform(self.options.high) + (uniform(2) - uniform(self.options.high)) * low / self.blocks

    def _errors(self, solver: str, measure: str, granularity: str) -> tuple[dict[str, dict[int, float]], list[str]]:
        """By unit, at all three levels: once for every budget and choice of levels."""
        method = lw.methods.LeastError(
            bits=float(self.options.high), levels=f"2,3,{self.options.high}", nominal=True,
            **self.grid(solver), solver=solver, measure=measure, granularity=granularity, samples=self.options.probes,
        )  # fmt: skip
        return method.measured(self._model(), self.data(), dealt(method, method, self._model(), None))

    def _data(self) -> lw.Batches:
        return batches(self.subject.calibration(self.options.samples, self.options.length, 0), 0)


def report(results: Lines, shown: dict[str, Bench], options: argparse.Namespace) -> Iterator[str]:
    yield "# Bits by layer: whose weights can do with 2"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {options.dtype}, losses in float32; {options.samples} x {options.length} calibration tokens, seed 0; perplexity on"
        f" up to {options.tokens} held-out tokens in windows of {options.length}; `random` is the mean ± standard deviation of"
        f" {options.draws} orders. Levels {options.high} and 2, groups of {options.group}, symmetric grids, for hqq zeros of 16 bits."
        " Bits are true bits per weight of"
        " the blocks' matrices, scales and zeros counted, the same in a column. Errors of outputs, weighed by the loss's gradient, and"
        f" divergences of predictions, on {options.probes} samples, are measured with the solver of the table. Texts: README.md."
    )
    for model, bench in shown.items():
        dense = results[bench.key(Cell(model))]["perplexity"]
        caveat = CAVEATS.get(model, "")
        yield from ["", f"## {model}", "", f"Dense: {dense:.3f}. {bench.blocks} blocks. {caveat}".strip()]
        for solver in options.solvers.split(","):
            yield from ["", f"### {model}, {solver}", ""]
            yield from table(results, bench, solver)
    errors = {row["error"] for bench in shown.values() for row in results.of(protocol=bench.protocol) if "error" in row}
    yield from ["", *(f"- failed: {error}" for error in sorted(errors))]


def table(results: Lines, bench: Bench, solver: str) -> Iterator[str]:
    """Orders down, numbers of low blocks across."""
    points, model = bench.points(), bench.subject.name

    def rows(order: str, low: int) -> list[dict[str, Any]]:
        order = "lim" if low in (0, bench.blocks) else order
        return results.of(protocol=bench.protocol, model=model, solver=solver, order=order, low=low)

    bits = [statistics.fmean([row.get("bits", math.nan) for row in rows("lim", low)] or [math.nan]) for low in points]
    yield f"| blocks at 2 bits | {' | '.join(map(str, points))} |"
    yield f"|---|{'--:|' * len(points)}"
    yield f"| true bits | {' | '.join(f'{one:.3f}' for one in bits)} |"
    for order in (*ORDERS, *bench.measured_orders):
        yield f"| {order} | {' | '.join(mean_deviation(rows(order, low)) for low in points)} |"
    same = {
        order: results.of(protocol=bench.protocol, model=model, solver=solver, order=order, low=AS_UNIFORM)
        for order in ("uniform 3", *bench.freest)
    }
    said = "; ".join(f"{order}: {mean_deviation(rows)}" for order, rows in same.items())
    yield from ["", f"All with the {bench.budget(solver, AS_UNIFORM):.3f} true bits of 3 everywhere: {said}."]


if __name__ == "__main__":
    main()
