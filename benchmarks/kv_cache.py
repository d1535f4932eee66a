"""What a quantised KV cache costs and takes: uniform pairs in both modes, beside the plain cache and transformers' QuantizedCache.

    python benchmarks/kv_cache.py --bed FOLDER --work /tmp/kv --peer-python peer/bin/python

Every measurement is written to a file as soon as it is made, so a run that was killed goes on where it stopped. See README.md.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

import layerwise as lw
from bed import Subject, add_arguments, subjects
from kv_measuring import decoding, quality
from layerwise.cache import parse_pair
from lines import Lines, Row
from measuring import machine

HERE = Path(__file__).parent
PAIRS = "K8V8,K8V4,K4V8,K4V4,K4V2,K2V2"
PEERS = "quanto-4,quanto-2,hqq-8,hqq-4,hqq-2"
PLAIN = "plain"
RESIDUAL = 32  # of ours, in both modes: the default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="stories260k,demo,smollm2")
    parser.add_argument("--pairs", default=PAIRS)
    parser.add_argument("--modes", default="per-token,kivi")
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument(
        "--peer-python", type=Path, help="of an environment with optimum-quanto and hqq; none: no peers"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens, in windows of --length")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--step", type=int, default=16, help="tokens of a pass, for the KL that peers can be held to")
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded together")
    parser.add_argument("--context", type=int, default=448, help="tokens of the prompt before decoding is timed")
    parser.add_argument("--new", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=3, help="times that every cache is timed, in turns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results/kv_cache.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)

    results, shown = Lines(options.out.with_suffix(".jsonl")), {}
    for subject in subjects(options):
        shown[subject.name] = protocol = protocol_of(subject, options)
        measure(subject, protocol, results, options)
    text = "\n".join(report(results, shown, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def protocol_of(subject: Subject, options: argparse.Namespace) -> Row:
    """What a number depends on beside its cache."""
    weights = hashlib.sha256()
    for file in sorted(subject.folder.glob("*.safetensors")):
        weights.update(file.read_bytes())
    return {
        "weights": weights.hexdigest()[:12],
        "evaluated": [options.tokens, options.length, options.step],
        "decoded": [options.batch, options.context, options.new],
        "residual": RESIDUAL,
        "run": [options.dtype, options.device, options.threads],
        "layerwise": lw.__version__,
        "torch": torch.__version__,
    }


def rows_of(options: argparse.Namespace) -> list[str]:
    """Names of everything that is measured, the plain cache first."""
    ours = [f"{pair} {mode}" for mode in options.modes.split(",") for pair in options.pairs.split(",")]
    return [PLAIN, *ours, *(options.peers.split(",") if options.peer_python and options.peers else [])]


def measure(subject: Subject, protocol: Row, results: Lines, options: argparse.Namespace) -> None:
    """Everything that is not measured yet. Times in turns, so that a busy minute does not fall on one cache alone."""
    parts = ["quality", *(f"time {turn}" for turn in range(options.rounds))]
    asked = [key_of(subject.name, name, part, protocol) for part in parts for name in rows_of(options)]
    missing = [key for key in asked if key not in results]
    if not missing:
        return
    model = lw.load(subject.folder, dtype=options.dtype, device=options.device)
    limit = model.config.max_position_embeddings
    windows = [window.to(options.device) for window in subject.evaluation(options.tokens, min(options.length, limit))]
    long = torch.cat(windows).repeat(-(-options.batch * limit // sum(map(len, windows))))
    total = min(options.context + options.new, limit)
    prompt = long[: options.batch * total].reshape(options.batch, total)
    ids = options.work / f"{subject.name}.ids.safetensors"
    save_file({"prompt": prompt.cpu()} | {f"window.{i}": one.cpu() for i, one in enumerate(windows)}, ids)
    for key in missing:
        name, of_quality = key["cache"], key["part"] == "quality"
        if name.partition("-")[0] in ("quanto", "hqq"):
            row = peer(name, subject, ids, model, options, of_quality=of_quality)
        elif of_quality:
            row = judged(name, model, windows, options)
        else:
            row = decoding(model, prompt, maker(name, model), options.new)
        results.add(key, row)
        print(subject.name, name, key["part"], row, file=sys.stderr, flush=True)


def key_of(model: str, name: str, part: str, protocol: Row) -> Row:
    return {"model": model, "cache": name, "part": part, "protocol": protocol}


def maker(name: str, model: nn.Module) -> Callable[..., Any]:
    """What makes an empty cache of ours, or a plain one."""
    if name == PLAIN:
        return partial(DynamicCache, config=model.config)
    pair, mode = name.split()
    return partial(
        lw.QuantizedKVCache.uniform, *parse_pair(pair), model.config, mode=mode, **group_of(mode, model)
    )  # fmt: skip


def judged(name: str, model: nn.Module, windows: list[Tensor], options: argparse.Namespace) -> Row:
    """In passes, and (ours) in one pass."""
    make = maker(name, model)
    row: Row = quality(model, windows, make, options.step)
    if name == PLAIN:
        return row
    data = lw.Batches(tuple({"input_ids": window[None]} for window in windows), {})
    once = lw.evaluate(model, data, against=model, cache=make(quantize_prefill=True), convention="all")
    assert once.cache is not None
    return row | {
        "once_kl": once.kl,
        "once_perplexity": once.perplexity,
        "bits": once.cache.bits,
        "bytes_per_token": once.cache.bytes_per_token,
        **group_of(name.split()[1], model),
    }


def group_of(mode: str, model: nn.Module) -> Row:
    """Groups of 32 in mode kivi, fewer where a head is smaller; per-token groups are the head."""
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return {"group": min(32, head), "residual": RESIDUAL} if mode == "kivi" else {}


def peer(
    name: str, subject: Subject, ids: Path, model: nn.Module, options: argparse.Namespace, *, of_quality: bool
) -> Row:
    """transformers' QuantizedCache in the peer's environment, its own defaults for the residual, per-token groups."""
    backend, bits = name.split("-")
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    job = {
        "model": str(subject.folder), "ids": str(ids), "backend": backend, "bits": int(bits), "group": min(64, head),
        "residual": 128, "step": options.step, "new": options.new, "threads": options.threads, "dtype": options.dtype,
        "device": options.device, "quality": of_quality,
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [options.peer_python, HERE / "peer_kv_cache.py", json.dumps(job)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def report(results: Lines, shown: dict[str, Row], options: argparse.Namespace) -> Iterator[str]:
    yield "# KV cache: what fewer bits cost, and what they take"
    yield ""
    yield f"Machine: {machine()}; {options.threads} threads, {options.device}, {options.dtype}."
    yield f"layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: up to {options.tokens} held-out tokens in windows of {options.length}. KL from the same model with the plain cache, in"
        " nats a token. *One pass*: every token attends to quantised keys and values. *Passes*: windows go through in passes of"
        f" {options.step} tokens, which attend to the past as it is stored and to themselves exactly, as in generation. Bits and bytes a"
        " token: once the text is long, scales and offsets counted, full precision as 16 bits. Held: measured at the end of decoding, in"
        f" the run's dtype, all parts. Tokens/s: {options.batch} x {options.new} tokens decoded after {options.context}, the median step,"
        f" the median of {options.rounds} rounds (lowest-highest); CPU: by processor time, which other work on the machine disturbs less."
        f" Ours: residual {RESIDUAL}. Peers: per-token groups of a head, residual 128, their default."
    )
    for model, protocol in shown.items():
        yield from ["", f"## {model}", "", f"Weights {protocol['weights']}.", ""]
        judged_by = "KL, one pass | perplexity, one pass | KL, passes | perplexity, passes"
        yield f"| cache | bits | bytes/token | held | {judged_by} | tokens/s | CPU |"
        yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        for name in rows_of(options):
            judged_ = results.of(model=model, cache=name, part="quality", protocol=protocol)
            times = [
                results.of(model=model, cache=name, part=f"time {turn}", protocol=protocol)
                for turn in range(options.rounds)
            ]
            yield line(name, judged_[0], [row[0] for row in times], options.batch)


def line(name: str, row: Row, times: list[Row], batch: int) -> str:
    if error := next((one["error"] for one in (row, *times) if "error" in one), None):
        return f"| {name} | failed: {error} |{' |' * 8}"
    seconds, held = [one["seconds"] for one in times], times[0]["bytes"]
    processor = f"{batch / statistics.median(one['cpu_seconds'] for one in times):.1f}"
    speed = f"{batch / statistics.median(seconds):.1f} ({batch / max(seconds):.1f}-{batch / min(seconds):.1f})"
    parts = ["16" if name == PLAIN else "", "", f"{held:,}", "", ""]
    if "bits" in row:
        parts[:2] = [f"{row['bits']:.2f}", f"{row['bytes_per_token']:,.0f}"]
        parts[3:] = [f"{row['once_kl']:.4f}", f"{row['once_perplexity']:.3f}"]
    words = f"{name}, group {row['group']}" if "group" in row else name
    words = f"{words} {row['version']}" if "version" in row else words
    return f"| {words} | {' | '.join(parts)} | {row['kl']:.4f} | {row['perplexity']:.3f} | {speed} | {processor} |"


if __name__ == "__main__":
    main()
