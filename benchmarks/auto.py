"""Is `--method auto` ever worse than uniform on text that it never saw? Perplexity of both, and of each method's default.

    python benchmarks/auto.py --bed FOLDER --work /tmp/auto

For every model, sparsity and seed: search on calibration windows, prune the model by the plan that was found and by uniform,
and measure both on held-out text, with the error of the difference from the spread over windows. See README.md for the protocol.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import layerwise as lw
from bed import Subject, add_arguments, add_device, subjects
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
BATCH = 4  # samples in one forward pass of calibration
SOLVERS = {"wanda": lw.solvers.Wanda, "sparsegpt": lw.solvers.SparseGPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="stories260k,demo,smollm2")
    add_device(parser)
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--solver", choices=SOLVERS, default="wanda")
    parser.add_argument("--only", default="", help="methods to try beside uniform and random (default: all)")
    parser.add_argument("--minutes", type=float, default=0.0, help="of each search; 0: try everything")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens, in windows of --length")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--report", action="store_true", help="measure nothing more: write what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/auto.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    results = Lines(options.out.with_suffix(".jsonl"))
    wanted = []
    for subject in subjects(options):
        for key in keys(subject, options):
            if options.report and key not in results:
                continue
            wanted.append(key)
            if key not in results:
                results.add(key, measured(subject, key, options))
                print(f"{subject.name} {key['sparsity']} {key['seed']}: {results[key]}", file=sys.stderr, flush=True)
    text = "\n".join(report(results, wanted, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def keys(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    weights = hashlib.sha256()
    for file in sorted(subject.folder.glob("*.safetensors")):
        weights.update(file.read_bytes())
    for sparsity in map(float, options.sparsities.split(",")):
        for seed in range(options.seeds):
            yield {
                "model": subject.name,
                "weights": weights.hexdigest()[:12],
                "sparsity": sparsity,
                "seed": seed,
                "solver": options.solver,
                "only": options.only,
                **({"minutes": options.minutes} if options.minutes else {}),
                "calibration": [options.samples, options.length],
                "evaluated": [options.tokens, options.length],
                "dtype": options.dtype,
                "layerwise": lw.__version__,
                "torch": torch.__version__,
            }


def measured(subject: Subject, key: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One search, and what its plan and uniform's cost on held-out text."""
    model = lw.load(subject.folder, dtype=options.dtype, device=options.device)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    windows = subject.evaluation(options.tokens, options.length)
    ids = subject.calibration(options.samples, options.length, key["seed"])
    data = lw.Batches(tuple({"input_ids": part} for part in ids.split(BATCH)), {"seed": key["seed"]})
    solver = SOLVERS[options.solver]()

    started = time.perf_counter()
    auto = lw.methods.Auto(
        sparsity=key["sparsity"], only=options.only, solver=options.solver, minutes=options.minutes, seed=key["seed"]
    )
    search = auto.search(model, data, solver=solver)
    seconds = time.perf_counter() - started
    closest = min((one for one in search.tried if one.divergence is not None), key=lambda one: one.divergence or 0.0)

    found = {}
    plans = {"auto": search.plan, "uniform": lw.methods.Uniform(sparsity=key["sparsity"]).plan(model)}
    for name, plan in plans.items():
        model.load_state_dict(dense)
        lw.compress(model, plan, solver=solver, data=data)
        found[name] = losses(model, windows)
    counts = torch.tensor([len(window) - 1.0 for window in windows])
    auto_loss, uniform_loss = (_mean(found[name], counts) for name in ("auto", "uniform"))
    return {
        "dense": math.exp(_mean(_dense_losses(model, dense, windows), counts)),
        "uniform": math.exp(min(uniform_loss, 700)),
        "auto": math.exp(min(auto_loss, 700)),
        "difference": auto_loss - uniform_loss,  # nats per token
        "error": _error(found["auto"] - found["uniform"], counts),
        "closest": closest.name,
        "verdict": search.verdict,
        "tried": sum(one.divergence is not None for one in search.tried),
        "failed": [f"{one.name}: {one.reason}" for one in search.tried if one.divergence is None],
        "seconds": seconds,
    }


def _dense_losses(model: nn.Module, dense: dict[str, Tensor], windows: list[Tensor]) -> Tensor:
    model.load_state_dict(dense)
    return losses(model, windows)


@torch.no_grad()
def losses(model: nn.Module, windows: list[Tensor]) -> Tensor:
    """Mean loss of tokens 2..n of every window, in nats."""
    device, found = next(model.parameters()).device, []
    for window in (window.to(device) for window in windows):
        said = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        found.append(cross_entropy(said, window[1:]).cpu())
    return torch.stack(found).double()


def _mean(values: Tensor, counts: Tensor) -> float:
    return float((values * counts).sum() / counts.sum())


def _error(values: Tensor, counts: Tensor) -> float:
    """Standard error of the mean over windows, each weighted by its tokens."""
    share = counts.double() / counts.sum()
    return float(((values - _mean(values, counts)) * share).square().sum().sqrt())


def report(results: Lines, wanted: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    yield "# Auto beside uniform, on text that the search never saw"
    yield ""
    yield f"Machine: {machine(options.device)}; {options.threads} threads. layerwise {lw.__version__}, torch {torch.__version__}."
    limit = f"; {options.minutes:g} minutes for each search" if options.minutes else ""
    yield (
        f"Protocol: {options.dtype}, losses in float32; solver {options.solver}{limit}; search and pruning on the same {options.samples} x"
        f" {options.length} calibration tokens, drawn per seed; measured on up to {options.tokens} held-out tokens in windows of"
        f" {options.length}. Texts: README.md."
    )
    yield ""
    yield "| model | sparsity | seed | dense | uniform | auto | change of loss, nats | chosen | tried | search s |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|"
    worse = []
    for key in wanted:
        row = results[key]
        yield (
            f"| {key['model']} | {key['sparsity']:.0%} | {key['seed']} | {row['dense']:.2f} | {row['uniform']:.2f} | {row['auto']:.2f} |"
            f" {row['difference']:+.4f} ± {row['error']:.4f} | {row['verdict'].partition(':')[0]} | {row['tried']} | {row['seconds']:.0f} |"
        )
        if row["difference"] > 2 * row["error"]:
            worse.append(key)
    yield ""
    yield f"Worse than uniform by more than two standard errors: {len(worse)} of {len(wanted)}."
    for key in wanted:
        row = results[key]
        late = "".join(f" Not tried: {failed}." for failed in row["failed"])
        yield f"- {key['model']} {key['sparsity']:.0%} {key['seed']}: {row['verdict']}{late}"


if __name__ == "__main__":
    main()
