"""layerwise beside llm-compressor: time, memory and quality of one-shot pruning, same model, tokens and sparsity, in one run.

    python benchmarks/peers_pruning.py --bed FOLDER --peer-python PEER/bin/python --work /tmp/peers

Every measurement is a process of its own, with the same number of threads; sides take turns, forwards and backwards in turn. Each
repeat has calibration windows of its own: times are medians over repeats, perplexities means. Both sides read the same token ids and
write their weights; one evaluator, here, judges both. What is measured stands in a file in --work: killed, it goes on. See README.md.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bed import Subject, add_arguments, block_zeros, perplexity, subjects
from lines import Lines
from measuring import Job, machine

HERE = Path(__file__).parent
EVALUATED = (20_480, 512)  # tokens of the held-out text, window


@dataclass(frozen=True)
class Side:
    """One row of the table: who prunes, and how inputs reach a block."""

    name: str
    command: tuple[str, ...]
    propagate: str = "compressed"


@dataclass(frozen=True)
class Comparison:
    """What is done to the model, in words, and what of it is asked for by default."""

    title: str = "Pruning beside llm-compressor"
    what: str = "sparsity 50 % of the matrices in the blocks"
    methods: str = "wanda,sparsegpt,sparsegpt-2:4"
    sides: str = "llm-compressor,layerwise,layerwise dense"
    out: str = "peers_pruning.md"


def main(comparison: Comparison = Comparison(), about: str = __doc__) -> None:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    add_arguments(parser, models="smollm2,demo")
    parser.add_argument(
        "--peer-python", type=Path, help="python of the peer's environment; without it, layerwise alone"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="samples in one forward pass, both sides")
    parser.add_argument("--methods", default=comparison.methods)
    parser.add_argument("--sides", default=comparison.sides)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results" / comparison.out)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    sides = [side for side in all_sides(options.peer_python) if side.name in options.sides.split(",")]
    if not sides:
        parser.error(
            f"--sides {options.sides}: give some of {', '.join(side.name for side in all_sides(options.peer_python))}"
        )
    lines = Lines(options.work / "runs.jsonl")
    report = Report(options, comparison)
    for subject in subjects(options):
        windows = subject.evaluation(*EVALUATED)
        dense = subject.load()
        report.dense[subject.name] = perplexity(dense, windows)
        before = block_zeros(dict(dense.named_parameters()))[2]
        del dense
        files = calibration_files(subject, options)
        for method in options.methods.split(","):
            for repeat, side in turns(sides, options.repeats):
                job = Job(str(subject.folder), str(files[repeat]), "", method, 0.5, options.batch, options.threads)
                key = {"side": side.name, "job": asdict(job), "calibration": [options.samples, options.length]}
                if key not in lines:
                    weights = options.work / f"{side.name.replace(' ', '-')}.weights.safetensors"
                    row = one_run(side, job, weights) | judged(subject, windows, weights, before)
                    lines.add(key, row)
                report.add(subject.name, method, side.name, lines[key])
    report.write()


def calibration_files(subject: Subject, options: argparse.Namespace) -> list[Path]:
    """One file of ids per repeat: the next windows of the text in order, or where they are drawn, another seed."""
    samples, files = options.samples, []
    for repeat in range(options.repeats):
        if subject.name == "demo":
            ids = subject.calibration(samples, options.length, seed=repeat)
        else:
            ids = subject.calibration(samples * (repeat + 1), options.length, seed=None)[-samples:]
        files.append(options.work / f"{subject.name}.{repeat}.ids.safetensors")
        save_file({"input_ids": ids.contiguous()}, files[-1])
    return files


def all_sides(peer_python: Path | None) -> list[Side]:
    ours = (sys.executable, str(HERE / "ours_pruning.py"))
    sides = [Side("layerwise", ours), Side("layerwise dense", ours, propagate="dense")]
    if peer_python is not None:
        sides.insert(0, Side("llm-compressor", (str(peer_python), str(HERE / "peer_llmcompressor.py"))))
    return sides


def turns(sides: list[Side], repeats: int) -> Iterator[tuple[int, Side]]:
    """(repeat, side), in alternating order, so that a slow spell of the machine does not meet one side alone."""
    for repeat in range(repeats):
        yield from ((repeat, side) for side in (sides if repeat % 2 == 0 else reversed(sides)))


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
    print(f"{Path(job.model).name} {job.method} {side.name}: {measured['seconds']:.1f} s", file=sys.stderr, flush=True)
    return measured | {"load": os.getloadavg()[0]}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats, perplexities as means; times in plain forwards are taken within each process before that."""
    median = lambda values: statistics.median([*values])  # noqa: E731
    seconds, judged = [run["seconds"] for run in runs], [run["perplexity"] for run in runs]
    return {
        "perplexity": statistics.fmean(judged),
        "perplexities": judged,
        "zeros": runs[0]["zeros"],
        "zeros_elsewhere": max(run["zeros_elsewhere"] for run in runs),
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
        "load": [run["load"] for run in runs],
        "runs": len(runs),
    }


def judged(subject: Subject, windows: list[Any], weights: Path, before: int) -> dict[str, Any]:
    """Perplexity and zeros of the weights that a side wrote, in the stock model.

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

    def __init__(self, options: argparse.Namespace, comparison: Comparison) -> None:
        self.options, self.comparison = options, comparison
        self.dense: dict[str, float] = {}
        self.runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def add(self, model: str, method: str, side: str, run: dict[str, Any]) -> None:
        self.runs.setdefault((model, method, side), []).append(run)

    @property
    def rows(self) -> list[dict[str, Any]]:
        names = ("model", "method", "side")
        return [dict(zip(names, key, strict=True)) | summary(runs) for key, runs in self.runs.items()]

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
            f"# {self.comparison.title}",
            "",
            f"Machine: {machine()}; {options.threads} threads a process, one process at a time.",
            *(f"Versions, {line}." for line in named),
            f"Evaluated with transformers {importlib.metadata.version('transformers')}.",
            "",
            f"Protocol: float32; {options.samples} x {options.length} calibration tokens in batches of {options.batch}, the same"
            f" ids for every side; {self.comparison.what}; {options.repeats} runs taking turns, each on windows of"
            f" its own: median times, mean perplexities; on the first {EVALUATED[0]} held-out tokens in windows of {EVALUATED[1]},"
            " by one evaluator.",
            "Calibration and held-out text: C4 (its windows in order) and WikiText-2 for smollm2, python-docs and its held-out"
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
            "| model | method | side | times faster | times less peak | times less grown | perplexity, mean change (each repeat) |",
            "|---|---|---|--:|--:|--:|--:|",
        ]
        rows = self.rows
        peers = {(row["model"], row["method"]): row for row in rows if row["side"] == "llm-compressor"}
        for row in rows:
            peer = peers.get((row["model"], row["method"]))
            if peer and row["side"] != "llm-compressor":
                faster, peak, grown = (peer[key] / row[key] for key in ("seconds", "peak_bytes", "grown_bytes"))
                changes = [a / b - 1 for a, b in zip(row["perplexities"], peer["perplexities"], strict=True)]
                lines.append(
                    f"| {row['model']} | {row['method']} | {row['side']} | {faster:.2f} | {peak:.2f} | {grown:.2f}"
                    f" | {statistics.fmean(changes):+.2%} ({', '.join(f'{change:+.2%}' for change in changes)}) |"
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
        _mean_deviation(row["perplexities"]),
    ]
    return f"| {' | '.join(cells)} |"


def _mean_deviation(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
