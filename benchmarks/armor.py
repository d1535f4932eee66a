"""ARMOR beside 2:4 pruning on language models: perplexity, bytes and time; and its default form beside the published one.

    python benchmarks/armor.py --bed FOLDER --work WORK --models demo,smollm2
    python benchmarks/armor.py --bed FOLDER --work WORK --models demo,smollm2 --full --device cuda --out benchmarks/results/armor_cuda
    python benchmarks/armor.py --work WORK --models demo --toy        # a few tokens: the same code, no claim

Every row is one compressed model, in bfloat16: 2:4 by magnitude, Wanda, SparseGPT and NoWag-P; ARMOR with two block sizes; its published
form (joint Adam, the official rate) for as many seconds in every layer as the default took; and pruned models of about as many bytes as
ARMOR has: 2:4 with blocks at both ends left dense, and 5:8. Wanda and SparseGPT are measured on inputs that compressed blocks produce,
NoWag-P and ARMOR on those of the dense model, as published. Solving is counted in CPU seconds of one thread: a busy
machine adds none (`--device cuda`: in seconds).

Bytes are those of the compressed layers: kept values of 16 bits and one bit for every position, both factors of 16-bit numbers. The
traces fit single layers for longer, at the published rate and at ten times that. Rows that the file has already are not measured again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import layerwise as lw
from bed import Subject, add_arguments, subjects
from layerwise.errors import SelectionError
from layerwise.passes import collect_dense
from layerwise.plan import Plan, Prune
from layerwise.solvers import ARMOR, Solver
from layerwise.solvers.armor_fit import Fit, adam, exact
from layerwise.solvers.armor_state import Target, start
from layerwise.solvers.nowag import normalise, power_of
from layerwise.solvers.select import keep_nm
from layerwise.structure import Structure, parameter_of
from layerwise.tasks import Batches
from measuring import machine

BLOCKS = {"demo": (8, 16), "stories260k": (4, 8), "smollm2": (32, 64)}  # sides of the diagonal blocks, at most


@dataclass(frozen=True)
class Protocol:
    """Calibration and evaluation in windows of `length` tokens; iterations of the fit; CPU seconds of a trace."""

    samples: int = 8
    length: int = 512
    tokens: int = 8192
    iterations: int = 12
    seconds: float = 40.0
    roles: tuple[str, ...] = ("o", "down")


SHORT = Protocol(samples=4, tokens=4096, iterations=8, seconds=20.0)  # a model of 135 million weights on one busy core
PROTOCOLS = {"demo": Protocol(seconds=8.0), "stories260k": Protocol(length=256), "smollm2": SHORT}
FULL = Protocol(iterations=30, seconds=5.0)
TOY = Protocol(samples=2, length=64, tokens=256, iterations=2, seconds=0.5, roles=("o",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "demo,smollm2")
    parser.add_argument("--toy", action="store_true", help="a few tokens and iterations")
    parser.add_argument("--iterations", type=int, help="of the fit (default: 12, of smollm2 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models are (default: cpu)")
    parser.add_argument(
        "--full", action="store_true", help="4096 + 8192 tokens and 30 iterations for every model: for a GPU"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing: write the table of what is there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/armor"), help="without .jsonl and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    DEVICE["name"] = options.device
    rows = Rows(options.out.with_suffix(".jsonl"))
    protocols = {}
    for subject in subjects(options):
        protocol = TOY if options.toy else FULL if options.full else PROTOCOLS[subject.name]
        protocols[subject.name] = replace(protocol, iterations=options.iterations or protocol.iterations)
        for _ in (
            [None] if options.report else Measured(subject, protocols[subject.name], rows).all()
        ):  # the table is there whenever it is stopped
            options.out.with_suffix(".md").write_text("\n".join(tables(rows.all, protocols)) + "\n", encoding="utf-8")


class Rows:
    """What was measured, a line each, written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.all)

    def found(self, field: str, **key: Any) -> Any:
        """What the first such row says."""
        return next(row.get(field) for row in self.all if all(row.get(name) == value for name, value in key.items()))

    def add(self, **row: Any) -> None:
        self.all.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("fits", "points")}, flush=True)


class Clocked(ARMOR):
    """ARMOR that notes the CPU seconds of every fit; given a list of seconds, the published form for as long as each says."""

    def fit(self, target: Target, generator: torch.Generator) -> Fit:
        noted: list[float] = CLOCK["noted"]
        limits: list[float] | None = CLOCK["limits"]
        started = seconds_now()
        found = (
            super().fit(target, generator) if limits is None else within(target, self.rate, limits.pop(0), generator)
        )
        noted.append(seconds_now() - started)
        CLOCK["losses"].append((found.losses[0], min(found.losses)))
        return found


DEVICE = {"name": "cpu"}
CLOCK: dict[str, Any] = {"noted": [], "limits": None, "losses": []}


def seconds_now() -> float:
    """CPU seconds of this process; with CUDA those of the clock, once the device has finished."""
    if DEVICE["name"] == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def within(target: Target, rate: float, seconds: float, generator: torch.Generator) -> Fit:
    state = start(target, keep_nm(target.weight.square() * target.power, target.n, target.m))
    total, losses, started = float(target.total), [], seconds_now()
    best = state.copy()
    for now in adam(target, state, rate, generator):
        losses.append(float(now) / total)
        if losses[-1] == min(losses):
            best = state.copy()
        if seconds_now() - started > seconds:
            break
    return Fit(best, tuple(losses))


class Measured:
    """One model with all that is done to it."""

    def __init__(self, subject: Subject, protocol: Protocol, rows: Rows) -> None:
        self.subject, self.protocol, self.rows = subject, protocol, rows
        self.windows = subject.evaluation(protocol.tokens, protocol.length)
        ids = subject.calibration(protocol.samples, protocol.length, None)
        self.data = Batches(tuple({"input_ids": one[None]} for one in ids), {"source": "bed", "seed": 0})
        self.held_out = Batches(tuple({"input_ids": one[None]} for one in self.windows), {"source": "bed"})
        self.blocks = BLOCKS[subject.name]

    def all(self) -> Iterator[None]:
        """What says most comes first; yields after each row."""
        dense = self.model()
        structure, solvers = lw.structure_of(dense), lw.solvers
        half = lw.methods.Uniform(pattern="2:4").plan(dense)
        plans = {
            side: lw.methods.Armor(block=side, overhead=1.0, indivisible="dense").plan(dense) for side in self.blocks
        }
        bits = {side: plan.achieved_bits(structure.layers) for side, plan in plans.items()}
        small, large = self.blocks
        fit = Clocked(iterations=self.protocol.iterations)
        if not self.rows.has(model=self.subject.name, name="dense"):
            known = self.perplexity(dense)
            self.rows.add(model=self.subject.name, name="dense", perplexity=known, bits=16.0, seconds=0.0)
        yield self.row("nowag 2:4", half, solvers.NoWag(), structure)
        yield self.row(f"armor b<={small}", plans[small], fit, structure)
        for name in ("magnitude", "wanda", "sparsegpt"):
            yield self.row(f"{name} 2:4", half, solvers.solver_from({"name": name}), structure)
        if limits := self.rows.found("fits", model=self.subject.name, name=f"armor b<={small}"):
            CLOCK["limits"] = list(limits)
            yield self.row(f"armor b<={small}, published form, as long", plans[small], Clocked(), structure)
            CLOCK["limits"] = None
        yield self.traces(dense, structure)
        yield self.row(f"armor b<={large}", plans[large], fit, structure)
        for side in self.blocks:
            ends = blocks_dense(half, structure, bits[side])
            for solver in (solvers.NoWag(), solvers.SparseGPT()):
                yield self.row(f"{solver.name} 2:4, ends dense, bytes of b<={side}", ends, solver, structure)
        more = lw.methods.Uniform(pattern="5:8").plan(dense)
        yield self.row("sparsegpt 5:8", more, solvers.SparseGPT(), structure)

    def row(self, name: str, plan: Plan, solver: Solver, structure: Structure) -> None:
        if self.rows.has(model=self.subject.name, name=name):
            return
        model = self.model()
        CLOCK["noted"], CLOCK["losses"] = [], []
        as_published = "dense" if solver.name in ("nowag", "armor") else "compressed"
        started, clock = seconds_now(), time.perf_counter()
        result = lw.compress(model, plan, solver=solver, data=self.data, settings=lw.Settings(propagate=as_published))
        spent, wall = seconds_now() - started, time.perf_counter() - clock
        losses = CLOCK["losses"]
        self.rows.add(
            model=self.subject.name,
            name=name,
            perplexity=self.perplexity(model),
            bits=result.bits or bits_of(plan, structure),
            seconds=spent,
            wall=wall,
            fit_seconds=sum(CLOCK["noted"]) or None,
            fits=CLOCK["noted"] or None,
            losses=[sum(part) / len(losses) for part in zip(*losses, strict=True)] if losses else None,
            blocks=sorted({one.factorize.block for one in plan.layers.values() if one.factorize}) or None,
        )

    def model(self) -> torch.nn.Module:
        return lw.load(self.subject.folder, dtype="bfloat16", device=DEVICE["name"])

    def perplexity(self, model: torch.nn.Module) -> float:
        return lw.evaluate(model, self.held_out, convention="all").perplexity

    def traces(self, model: torch.nn.Module, structure: Structure) -> None:
        """Loss over CPU seconds of single layers: the default, and the published form at two rates."""
        name = structure.blocks[len(structure.blocks) // 2].name
        chosen = [layer for layer in structure if layer.block == name and layer.role in self.protocol.roles]
        if all(self.rows.has(model=self.subject.name, trace=layer.name) for layer in chosen):
            return
        found = {n: s for _, part in collect_dense(model, structure, self.data, "squares") for n, s in part.items()}
        for layer in chosen:
            power, _ = power_of(found[layer.name][0])
            weight = normalise(parameter_of(model, layer).detach().float()).weight
            side = max(
                one for one in range(4, self.blocks[-1] + 1, 4) if layer.rows % one == 0 and layer.columns % one == 0
            )
            target = Target(weight, power, side, 2, 4)
            for form, rate in (("default", 0.0), ("published, rate 1e-4", 1e-4), ("published, rate 1e-3", 1e-3)):
                points = list(self.trace(target, rate))
                self.rows.add(model=self.subject.name, trace=layer.name, form=form, block=side, points=points)

    def trace(self, target: Target, rate: float) -> Iterator[tuple[float, float]]:
        """(CPU seconds, relative loss) after each iteration; the default for a quarter of the time."""
        state = start(target, keep_nm(target.weight.square() * target.power, target.n, target.m))
        stream, plain = torch.Generator().manual_seed(0), ARMOR()
        going = (
            adam(target, state, rate, stream)
            if rate
            else exact(target, state, plain.draws, plain.steps, plain.select, stream)
        )
        most = self.protocol.seconds / (1 if rate else 4)
        total, started = float(target.total), seconds_now()
        for now in going:
            spent = seconds_now() - started
            yield round(spent, 3), round(float(now) / total, 7)
            if spent > most:
                return


def blocks_dense(half: Plan, structure: Structure, bits: float) -> Plan:
    """2:4 everywhere but in blocks at both ends, first and last in turn, until the layers take as many bits as these, or just fewer."""
    order = [*structure.blocks]
    ends = [order.pop(0 if index % 2 == 0 else -1) for index in range(len(order))]
    layers = dict(half.layers)
    for block in ends:
        without = {name: one for name, one in layers.items() if name not in {layer.name for layer in block.layers}}
        if not without or bits_of(Plan(layers=without), structure) > bits:
            break
        layers = without
    if len(layers) == len(half.layers):
        raise SelectionError(f"no block can stay dense within {bits:.3f} bits per weight.")
    return Plan(layers=layers)


def bits_of(plan: Plan, structure: Structure) -> float:
    """Bits per weight over all layers of the structure: n:m with a bit a position, what the plan leaves out with 16."""
    bits = 0.0
    for layer in structure.layers:
        prune: Prune | None = plan.layers[layer.name].prune if layer.name in plan.layers else None
        bits += layer.size * (16.0 if prune is None else 16 * (1 - prune.sparsity) + 1)
    return bits / sum(layer.size for layer in structure.layers)


def tables(rows: list[dict[str, Any]], protocols: dict[str, Protocol]) -> Iterator[str]:
    yield from ["# ARMOR beside 2:4 pruning", ""]
    yield f"Machine: {machine()}; torch {torch.__version__}, layerwise {lw.__version__}."
    gpu = torch.cuda.get_device_name() if DEVICE["name"] == "cuda" else None
    yield (
        f"Seconds are of {gpu}."
        if gpu
        else "Seconds are CPU seconds of one thread, on a machine shared with other work."
    )
    yield "Bits per weight: of the compressed layers alone, see the head of `benchmarks/armor.py`."
    for model, protocol in protocols.items():
        mine = [row for row in rows if row["model"] == model]
        yield from ["", f"## {model}", "", _line(protocol), "", *table([row for row in mine if "name" in row])]
        yield from ["", *trace_table([row for row in mine if "trace" in row])]


def _line(protocol: Protocol) -> str:
    return (
        f"Protocol: bfloat16; {protocol.samples} windows of {protocol.length} tokens of calibration, the first of the text; perplexity of"
        f" {protocol.tokens} held-out tokens in windows of {protocol.length}; ARMOR {protocol.iterations} iterations; one seed."
    )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    known = {row["name"]: row["perplexity"] for row in rows}
    dense, nowag = known.get("dense"), known.get("nowag 2:4")
    yield (
        "| model | perplexity | gap NoWag-P to dense closed | bits per weight | share of dense bytes | s to compress |"
        " of that fitting | mean loss before, after |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        closed = "-"
        if dense is not None and nowag is not None and row["name"] != "dense":
            closed = f"{(nowag - row['perplexity']) / (nowag - dense):.0%}"
        fit = f"{row['fit_seconds']:.0f}" if row.get("fit_seconds") else "-"
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"]) if row.get("losses") else "-"
        blocks = f" ({', '.join(map(str, row['blocks']))})" if row.get("blocks") else ""
        yield (
            f"| {row['name']}{blocks} | {row['perplexity']:.2f} | {closed} | {row['bits']:.2f} | {row['bits'] / 16:.3f} |"
            f" {row['seconds']:.0f} | {fit} | {losses} |"
        )


def trace_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How long each form takes to the least loss that the published one reaches."""
    yield "| layer (block) | form | iterations | s | first loss | least loss | default is there after s | times faster |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    if not rows:
        yield "| not measured | | | | | | | |"
    own = {row["trace"]: row["points"] for row in rows if row["form"] == "default"}
    for row in rows:
        points = row["points"]
        least = min(loss for _, loss in points)
        reached, factor = "-", "-"
        if row["form"] != "default":
            when = next((seconds for seconds, loss in own[row["trace"]] if loss <= least), None)
            took = next(seconds for seconds, loss in points if loss == least)
            reached = "not reached" if when is None else f"{when:.2f}"
            factor = "-" if when is None else f"{took / max(when, 1e-4):.0f}"
        yield (
            f"| {row['trace']} ({row['block']}) | {row['form']} | {len(points) - 1} | {points[-1][0]:.1f} | {points[0][1]:.4f} |"
            f" {least:.4f} | {reached} | {factor} |"
        )


if __name__ == "__main__":
    main()
