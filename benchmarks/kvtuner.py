"""KVTuner beside uniform pairs at equal true bits: divergence and perplexity on text that the search never saw.

    python benchmarks/kvtuner.py --bed FOLDER --work /tmp/kv

Every row is written to a file as soon as it is measured, and a search is kept while it runs, so a run that was killed goes on.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise as lw
from bed import Subject, add_arguments, subjects
from layerwise.cache import parse_pair
from lines import Lines, Row
from measuring import machine

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="stories260k,demo")
    parser.add_argument(
        "--pairs", default="K4V2,K4V4,K8V4", help="uniform pairs; a plan of as many bits is searched beside each"
    )
    parser.add_argument("--modes", default="per-token,kivi")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--judged", type=int, default=4096, help="tokens that a choice is measured on")
    parser.add_argument(
        "--samples", type=int, default=32, help="windows of calibration text, a quarter of them for the verdict"
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results/kvtuner.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)

    results, named = Lines(options.out.with_suffix(".jsonl")), list(subjects(options))
    for subject in named:
        model = subject.load()
        for mode in options.modes.split(","):
            for pair in options.pairs.split(","):
                if (key := key_of(subject, mode, pair, options)) not in results:
                    results.add(key, measured(subject, model, mode, pair, options))
    text = "\n".join(report(results, named, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def key_of(subject: Subject, mode: str, pair: str, options: argparse.Namespace) -> Row:
    """What a row depends on."""
    searched = [options.trials, options.judged, options.samples, options.length, options.seed]
    return {"model": subject.name, "mode": mode, "pair": pair, "searched": searched, "held-out": options.tokens}


def measured(subject: Subject, model: nn.Module, mode: str, pair: str, options: argparse.Namespace) -> Row:
    """The uniform pair and the plan of at most its true bits, both with quantised prefill on the held-out text."""
    length = min(options.length, model.config.max_position_embeddings)
    calibration = batches(subject.calibration(options.samples, length, options.seed).split(4))
    windows = batches(window[None] for window in subject.evaluation(options.tokens, length))
    settings = scheme(model, mode)
    uniform = lw.QuantizedKVCache.uniform(*parse_pair(pair), model.config, mode=mode, quantize_prefill=True, **settings)
    tuner = lw.methods.KVTuner(
        bits=evaluated(model, windows, uniform)["bits"], mode=mode, trials=options.trials, judged=options.judged,
        seed=options.seed, **settings,
    )  # fmt: skip
    search = tuner.search(model, calibration, storage=options.work / f"{subject.name}.search.json")
    cache = lw.QuantizedKVCache.from_plan(search.plan, model.config, quantize_prefill=True)
    front = [[one.word, one.true, one.loss, one.unseen] for one in search.front]
    return {
        "uniform": evaluated(model, windows, uniform),
        "tuned": evaluated(model, windows, cache),
        "word": next(one.word for one in search.tried if one.pairs == cache.pairs),
        "tried": len(search.tried), "verdict": search.verdict, "front": front,
    }  # fmt: skip


def evaluated(model: nn.Module, windows: lw.Batches, cache: lw.QuantizedKVCache) -> Row:
    found = lw.evaluate(model, windows, against=model, cache=cache.fresh(), convention="all")
    assert found.cache is not None
    return {"kl": found.kl, "perplexity": found.perplexity, "dense": found.dense_perplexity, "bits": found.cache.bits}


def scheme(model: nn.Module, mode: str) -> dict[str, Any]:
    """Groups of 32 in mode kivi, fewer where a head is smaller; per-token groups are the head."""
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return {"group": min(32, head), "residual": 32} if mode == "kivi" else {}


def batches(some: Any) -> lw.Batches:
    return lw.Batches(tuple({"input_ids": ids} for ids in some), {})


def report(results: Lines, named: list[Subject], options: argparse.Namespace) -> Iterator[str]:
    yield "# KVTuner: a pair for each attention beside one pair for all"
    yield ""
    yield f"Machine: {machine()}; {options.threads} threads, float32. layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {options.trials} choices measured on {options.judged} tokens of the calibration text (KL from the full cache,"
        f" quantised prefill), the verdict on a quarter of {options.samples} windows of {options.length} that the search did not see,"
        f" seed {options.seed}; cap: the true bits of the uniform pair. KL in nats a token and perplexity: up to {options.tokens}"
        " held-out tokens, every token attending to quantised keys and values."
    )
    for subject in named:
        yield from ["", f"## {subject.name}", ""]
        yield "| mode | uniform | true bits | KL | perplexity | tuned | true bits | KL | perplexity | full cache |"
        yield "|---|---|---:|---:|---:|---|---:|---:|---:|---:|"
        for mode in options.modes.split(","):
            for pair in options.pairs.split(","):
                row = results[key_of(subject, mode, pair, options)]
                a, b = row["uniform"], row["tuned"]
                cells = [mode, pair, f"{a['bits']:.2f}", f"{a['kl']:.4g}", f"{a['perplexity']:.3f}", row["word"]]
                cells += [f"{b['bits']:.2f}", f"{b['kl']:.4g}", f"{b['perplexity']:.3f}", f"{a['dense']:.3f}"]
                yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
