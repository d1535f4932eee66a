"""How many tokens of training spares a model that is cut from a larger one: beside the same shape trained from nothing.

    python benchmarks/from_scratch.py --work /tmp/from_scratch                                    # the demo model, hours on a CPU
    python benchmarks/from_scratch.py --work /tmp/from_scratch --device cuda --batch 32

The demo model is cut by Adapt-Pruner to a share of its parameters. Three runs share that shape, text and recipe: from random weights;
cut, then trained; cut in stages with training between (Adapt-Accel). The second and third get more tokens until they are where the first
one ends. Every budget of tokens is a run of its own, with its own schedule of the learning rate, which each kind of run chose on other
text. The dense model's own training is not counted: the question is what a smaller one costs for whoever has the larger. Every run is a
line of the `.jsonl` as soon as it is measured.
"""

import argparse
import itertools
import math
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
from bed import Subject, add_arguments, add_device, perplexity, subjects
from layerwise.methods.adapt_accel import adapt_accel
from layerwise.randomness import generator_for
from layerwise.recover import Recovery
from layerwise.shrink import apply
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
ARMS = {"scratch": "from random weights", "cut": "Adapt-Pruner, then trained", "accel": "Adapt-Accel"}
RATES = (1e-3, 3e-3, 9e-3)
SEARCHED = 64  # windows that the choice of the rate looks at, none of them trained on


@dataclass(frozen=True)
class Cell:
    """One run. part: "rate" where it only chooses the learning rate."""

    share: float
    arm: str
    tokens: int
    lr: float
    part: str = "judged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo")
    add_device(parser)
    parser.add_argument("--shares", default="0.5", help="of the parameters that are kept")
    parser.add_argument("--budgets", default="0.25,0.5,1,2,4,8", help="millions of tokens")
    parser.add_argument(
        "--windows", type=int, default=8000, help="that training draws from; more tokens are further epochs"
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--stages", type=int, default=4, help="of Adapt-Accel")
    parser.add_argument("--step", type=float, default=0.02, help="of Adapt-Pruner's schedule")
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/from_scratch.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = Lines(options.out.with_suffix(".jsonl"))
    (subject,) = subjects(options)
    bench = Bench(subject, results, options)
    for share in map(float, options.shares.split(",")):
        for arm in () if options.report else ARMS:
            lr = bench.rate(share, arm)
            for tokens in bench.budgets:
                row = bench.row(Cell(share, arm, tokens, lr))
                if arm == "scratch":
                    goal = row["loss"]
                elif row["loss"] <= goal:
                    break
    text = "\n".join(report(bench, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


class Bench:
    """The texts, and the runs that are known."""

    def __init__(self, subject: Subject, results: Lines, options: argparse.Namespace) -> None:
        self.subject, self.results, self.options = subject, results, options
        self.budgets = [round(1e6 * float(one)) for one in options.budgets.split(",")]
        names = ("windows", "length", "batch", "stages", "step", "tokens")
        versions = {"layerwise": lw.__version__, "torch": torch.__version__, "device": options.device}
        self.protocol = {"model": subject.name, **{name: getattr(options, name) for name in names}, **versions}
        ids = subject.calibration(options.windows, options.length, 0)
        self.searched, self.held_out, train = ids[:SEARCHED], ids[SEARCHED : SEARCHED + 16], ids[SEARCHED + 16 :]
        self.train = [{"input_ids": part} for part in train.split(options.batch) if len(part) == options.batch]
        self.judged = subject.evaluation(options.tokens, options.length)
        self.looked_at = lw.Batches(tuple(self.train[:4]), {})
        self._plans: dict[float, lw.Plan] = {}

    def key(self, cell: Cell) -> dict[str, Any]:
        return {**asdict(cell), "protocol": self.protocol}

    def row(self, cell: Cell) -> dict[str, Any]:
        if self.key(cell) not in self.results:
            self.results.add(self.key(cell), row := self.measured(cell))
            print(" ".join(str(part) for part in asdict(cell).values()), row, file=sys.stderr, flush=True)
        return self.results[self.key(cell)]

    def rate(self, share: float, arm: str) -> float:
        """The learning rate of least loss, on text for that alone: at the budget in the middle, of cut models at the first."""
        tokens = self.budgets[len(self.budgets) // 2 if arm == "scratch" else 0]
        return min(RATES, key=lambda lr: self.row(Cell(share, arm, tokens, lr, "rate"))["loss"])

    def method(self, share: float) -> lw.methods.AdaptPruner:
        return lw.methods.AdaptPruner(parameters=share, step=self.options.step, amplitude=self.options.step)

    def plan(self, share: float) -> lw.Plan:
        """One for both runs that are cut at once."""
        if share not in self._plans:
            model = lw.load(self.subject.folder, dtype="float32", device=self.options.device)
            self._plans[share] = self.method(share).plan(model, self.looked_at)
        return self._plans[share]

    def measured(self, cell: Cell) -> dict[str, Any]:
        options, started = self.options, time.perf_counter()
        model = lw.load(self.subject.folder, dtype="float32", device=options.device)
        steps = max(1, round(cell.tokens / (options.batch * options.length)))
        recovery = Recovery(steps=steps, lr=cell.lr, looks=4, patience=4, schedule="wsd")
        with tempfile.TemporaryDirectory() as work:
            held_out = [{"input_ids": self.held_out}]
            if cell.arm == "accel":
                method, some = self.method(cell.share), self.looked_at
                adapt_accel(
                    model, method, some, self.train, held_out, recovery=recovery, stages=options.stages, work=work
                )
            else:
                apply(model, self.plan(cell.share))
                if cell.arm == "scratch":
                    forget(model)
                recovery.train(model, self.train, held_out, work=work)
        windows = list(self.searched) if cell.part == "rate" else self.judged
        size = sum(parameter.numel() for parameter in model.parameters())
        return {
            "loss": math.log(perplexity(model, windows)),
            "parameters": size,
            "seconds": time.perf_counter() - started,
        }


@torch.no_grad()
def forget(model: nn.Module) -> None:
    """Start anew: matrices normal with deviation 0.02, as the model was started; norms 1, biases 0."""
    draw = generator_for(0, "from-scratch")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))


def reached(curve: list[tuple[int, float]], loss: float) -> float | None:
    """Tokens at which a curve of (tokens, loss) comes down to this loss, between two budgets on a logarithmic line."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (few, high), (many, low) in itertools.pairwise(curve):
        if low <= loss:
            share = (high - loss) / (high - low)
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return None


def report(bench: Bench, options: argparse.Namespace) -> Iterator[str]:
    yield "# Tokens that a cut model spares, beside the same shape from nothing"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {bench.subject.name}, float32; AdamW, warm-up, constant rate, down over the last tenth;"
        f" {options.batch} x {options.length} tokens a step from {len(bench.train) * options.batch} windows of python-docs, again where"
        f" they run out; rate of each kind of run chosen from {', '.join(f'{one:g}' for one in RATES)} at"
        f" {bench.budgets[len(bench.budgets) // 2] / 1e6:g}M tokens (cut models:"
        f" {bench.budgets[0] / 1e6:g}M);"
        f" {options.stages} stages of Adapt-Accel; no teacher; one seed. Loss in nats on up to {options.tokens} held-out tokens."
    )
    dense = lw.load(bench.subject.folder, dtype="float32", device=options.device)
    size = sum(parameter.numel() for parameter in dense.parameters())
    yield from ["", f"Dense: {size:,} parameters, loss {math.log(perplexity(dense, bench.judged)):.4f}."]
    for share in map(float, options.shares.split(",")):
        curves, lines = {}, []
        for arm, said in ARMS.items():
            rows = {
                key["tokens"]: (key["lr"], row)
                for key, row in bench.results.entries(share=share, arm=arm, part="judged", protocol=bench.protocol)
            }
            if rows:
                curves[arm] = sorted((tokens, row["loss"]) for tokens, (_, row) in rows.items())
                rate, any_row = next(iter(rows.values()))
                cells = [f"{rows[one][1]['loss']:.4f}" if one in rows else "" for one in bench.budgets]
                lines.append(f"| {said} | {any_row['parameters']:,} | {rate:g} | {' | '.join(cells)} |")
        heads = [f"{one / 1e6:g}M" for one in bench.budgets]
        yield from ["", f"## {share:.0%} of the parameters", ""]
        yield f"| run | parameters | rate | {' | '.join(heads)} |"
        yield f"|---|--:|--:|{'--:|' * len(heads)}"
        yield from lines
        if "scratch" in curves:
            tokens, loss = curves["scratch"][-1]
            yield ""
            for arm in [one for one in curves if one != "scratch"]:
                found = reached(curves[arm], loss)
                most = " or fewer" if found == curves[arm][0][0] else ""
                yield (
                    f"- {ARMS[arm]}: does not reach {loss:.4f}, the loss from random weights after {tokens / 1e6:g}M tokens"
                    if found is None
                    else f"- {ARMS[arm]}: reaches {loss:.4f}, the loss from random weights after {tokens / 1e6:g}M tokens, with"
                    f" {found / 1e6:g}M{most}, {tokens / found:.0f} times less."
                )


if __name__ == "__main__":
    main()
