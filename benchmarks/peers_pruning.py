"""layerwise beside llm-compressor: time, memory and quality of one-shot pruning, same model, tokens and sparsity, in one run.

    python benchmarks/peers_pruning.py --bed FOLDER --peer-python PEER/bin/python --work /tmp/peers

Every measurement is a process of its own, with the same number of threads; sides take turns, forwards and backwards in turn, and the
medians are reported. Both sides read the same token ids and write their weights; one evaluator, here, judges both. See README.md.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bed import Subject, add_arguments, block_zeros, perplexity, subjects
from measuring import Job, machine

HERE = Path(__file__).parent
EVALUATED = (20_480, 512)  # tokens of the held-out text, window


@dataclass(frozen=True)
class Side:
    """One row of the table: who prunes, and how inputs reach a block."""

    name: str
    command: tuple[str, ...]
    propagate: str = "compressed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="smollm2,demo")
    parser.add_argument(
        "--peer-python", type=Path, help="python of the peer's environment; without it, layerwise alone"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="samples in one forward pass, both sides")
    parser.add_argument("--methods", default="wanda,sparsegpt,sparsegpt-2:4")
    parser.add_argument("--sides", default="llm-compressor,layerwise,layerwise dense")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results/peers_pruning.md")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    sides = [side for side in all_sides(options.peer_python) if side.name in options.sides.split(",")]
    if not sides:
        parser.error(
            f"--sides {options.sides}: give some of {', '.join(side.name for side in all_sides(options.peer_python))}"
        )
    report = Report(options, [side.name for side in sides])
    for subject in subjects(options):
        ids = options.work / f"{subject.name}.ids.safetensors"
        save_file({"input_ids": subject.calibration(options.samples, options.length, seed=None)}, ids)
        windows = subject.evaluation(*EVALUATED)
        dense = subject.load()
        report.dense[subject.name] = perplexity(dense, windows)
        before = block_zeros(dict(dense.named_parameters()))[2]
        del dense
        for method in options.methods.split(","):
            job = Job(str(subject.folder), str(ids), "", method, 0.5, options.batch, options.threads)
            for side, runs in take_turns(sides, job, options).items():
                row = summary(runs) | judged(subject, windows, weights_file(options, side), before)
                report.add(subject.name, method, side.name, row)
    report.write()


def all_sides(peer_python: Path | None) -> list[Side]:
    ours = (sys.executable, str(HERE / "ours_pruning.py"))
    sides = [Side("layerwise", ours), Side("layerwise dense", ours, propagate="dense")]
    if peer_python is not None:
        sides.insert(0, Side("llm-compressor", (str(peer_python), str(HERE / "peer_llmcompressor.py"))))
    return sides


def take_turns(sides: list[Side], job: Job, options: argparse.Namespace) -> dict[Side, list[dict[str, Any]]]:
    """Every side `repeats` times, in alternating order, so that a slow spell of the machine does not meet one side alone."""
    runs: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(options.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            runs[side].append(one_run(side, job, weights_file(options, side)))
            last = runs[side][-1]
            print(
                f"{Path(job.model).name} {job.method} {side.name}: {last['seconds']:.1f} s", file=sys.stderr, flush=True
            )
    return runs


def weights_file(options: argparse.Namespace, side: Side) -> Path:
    return options.work / f"{side.name.replace(' ', '-')}.weights.safetensors"


def one_run(side: Side, job: Job, weights: Path) -> dict[str, Any]:
    """A process of its own. The last line of its output is the measurement; its errors go to ours."""
    settled = Job(**{**job.__dict__, "weights": str(weights), "propagate": side.propagate})
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(
        [*side.command, settled.to_json()], env={**os.environ, **quiet}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side.name} failed on {job.method} (exit code {done.returncode}); its message is above.")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats; times in plain forwards are taken within each process before that."""
    median = lambda values: statistics.median([*values])  # noqa: E731
    seconds = [run["seconds"] for run in runs]
    return {
        "seconds": median(seconds),
        "spread": [min(seconds), max(seconds)],
        "forwards": median(run["seconds"] / run["forward_seconds"] for run in runs),
        "bodies": median(run["seconds"] / run["body_seconds"] for run in runs),
        "forward_seconds": median(run["forward_seconds"] for run in runs),
        "body_seconds": median(run["body_seconds"] for run in runs),
        "peak_bytes": median(run["peak_bytes"] for run in runs),
        "grown_bytes": median(run["grown_bytes"] for run in runs),
        "versions": runs[0]["versions"],
        "own": runs[-1]["own"],
        "runs": len(runs),
    }


def judged(subject: Subject, windows: list[Any], weights: Path, before: int) -> dict[str, Any]:
    """Perplexity and zeros of the weights that a side wrote, in the stock model. They are deterministic: the last run's stand.

    before: zeros that the dense model has outside the matrices of its blocks.
    """
    stored = load_file(weights)
    model = subject.load()
    missing, extra = model.load_state_dict(stored, strict=False)
    if extra or not {*missing} <= {"lm_head.weight"}:
        raise SystemExit(f"{weights}: not the weights of {subject.name}: {[*missing, *extra][:3]}.")
    zeros, size, elsewhere = block_zeros(stored)
    return {"perplexity": perplexity(model, windows), "zeros": zeros / size, "zeros_elsewhere": elsewhere - before}


class Report:
    """The table, as text for people and JSON for programs."""

    def __init__(self, options: argparse.Namespace, sides: list[str]) -> None:
        self.options, self.sides = options, sides
        self.load = os.getloadavg()[0]  # before anything of ours runs: a busy machine is said beside its numbers
        self.dense: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, model: str, method: str, side: str, row: dict[str, Any]) -> None:
        self.rows.append({"model": model, "method": method, "side": side, **row})

    def write(self) -> None:
        text = "\n".join([*self._head(), "", *self._table(), "", *self._ratios(), "", *self._split()])
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(text.rstrip() + "\n", encoding="utf-8")
        facts = {"machine": machine(), "dense": self.dense, "rows": self.rows}
        self.options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(text)

    def _head(self) -> list[str]:
        versions = {row["side"].split()[0]: row["versions"] for row in self.rows}
        named = [f"{side}: {', '.join(f'{k} {v}' for k, v in found.items())}" for side, found in versions.items()]
        options = self.options
        return [
            "# Pruning beside llm-compressor",
            "",
            f"Machine: {machine()}; {options.threads} threads a process, one process at a time;"
            f" load average before the run {self.load:.1f}.",
            *(f"Versions, {line}." for line in named),
            f"Evaluated with transformers {importlib.metadata.version('transformers')}.",
            "",
            f"Protocol: float32; {options.samples} x {options.length} calibration tokens in batches of {options.batch}, the same"
            f" ids for every side; sparsity 50 % of the matrices in the blocks; median of {options.repeats} runs taking turns;"
            f" perplexity on the first {EVALUATED[0]} held-out tokens in windows of {EVALUATED[1]}, by one evaluator.",
            "Calibration and held-out text: C4 (its first windows in order) and WikiText-2 for smollm2, python-docs and its held-out"
            " modules for demo. Columns: README.md.",
        ]

    def _table(self) -> list[str]:
        lines = [
            "| model | method | side | seconds (min-max) | forwards | body forwards | peak MB | grown MB | zeros | elsewhere"
            " | perplexity |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for model, value in self.dense.items():
            lines.append(f"| {model} | - | dense | | | | | | | | {value:.3f} |")
            lines += [_line(row) for row in self.rows if row["model"] == model]
        return lines

    def _ratios(self) -> list[str]:
        """Each of our rows against the peer's: above 1 is better for layerwise in time and memory."""
        lines = [
            "| model | method | side | times faster | times less peak | times less grown | perplexity, change |",
            "|---|---|---|--:|--:|--:|--:|",
        ]
        peers = {(row["model"], row["method"]): row for row in self.rows if row["side"] == "llm-compressor"}
        for row in self.rows:
            peer = peers.get((row["model"], row["method"]))
            if peer and row is not peer:
                faster, peak, grown = (peer[key] / row[key] for key in ("seconds", "peak_bytes", "grown_bytes"))
                change = row["perplexity"] / peer["perplexity"] - 1
                lines.append(
                    f"| {row['model']} | {row['method']} | {row['side']} | {faster:.2f} | {peak:.2f} | {grown:.2f} | {change:+.2%} |"
                )
        return lines if peers else []

    def _split(self) -> list[str]:
        """Where our time goes, from the result of the last run."""
        split = [(row, row["own"]["split"]) for row in self.rows if "split" in row["own"]]
        if not split:
            return []
        parts = [*split[0][1]]
        return [
            f"| model | method | side | {' | '.join(f'{part} s' for part in parts)} |",
            f"|---|---|---|{'--:|' * len(parts)}",
            *(
                f"| {row['model']} | {row['method']} | {row['side']} | {' | '.join(f'{found[part]:.2f}' for part in parts)} |"
                for row, found in split
            ),
        ]


def _line(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    cells = [
        row["model"],
        row["method"],
        row["side"],
        f"{row['seconds']:.2f} ({low:.2f}-{high:.2f})",
        f"{row['forwards']:.2f}",
        f"{row['bodies']:.2f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['grown_bytes'] / 1e6:.0f}",
        f"{row['zeros']:.4%}",
        str(row["zeros_elsewhere"]),
        f"{row['perplexity']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
