"""Decoding with a quantised KV cache on one accelerator: tokens a second and memory, beside the plain cache.

    python benchmarks/kv_throughput_gpu.py --out benchmarks/results/kv_throughput_gpu.md
    python benchmarks/kv_throughput_gpu.py --toy            # the same code on a toy, on any machine

Blocks of Llama-3-8B's shape with random bfloat16 weights: speed and memory do not depend on them, quality is not judged here. The
prompt goes through the model once; every cache is then filled with the same keys and values.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import layerwise as lw
from kv_measuring import held
from layerwise.cache import parse_pair
from measuring import machine

PLAIN = "plain"
CACHES = ",".join([PLAIN, *(f"{pair} {mode}" for mode in ("per-token", "kivi") for pair in ("K8V8", "K4V4", "K2V2"))])


@dataclass(frozen=True)
class Size:
    """A model's shape and what is decoded; the defaults are Llama-3-8B's blocks, eight of them."""

    hidden: int = 4096
    intermediate: int = 14336
    blocks: int = 8
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    batch: int = 16
    context: int = 4096
    new: int = 32


TOY = Size(hidden=256, intermediate=512, blocks=2, heads=4, kv_heads=2, vocabulary=512, batch=2, context=256, new=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy size, on the CPU where there is no CUDA")
    parser.add_argument("--caches", default=CACHES, help="separated by commas: plain, or a pair and a mode")
    parser.add_argument("--batch", type=int, help="sequences that are decoded together (default: 16)")
    parser.add_argument("--context", type=int, help="tokens of the prompt (default: 4096)")
    parser.add_argument("--new", type=int, help="tokens that are decoded (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="times that every cache is timed, in turns")
    parser.add_argument("--out", type=Path, help="write the table here, and the measurements beside it as .jsonl")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("kv_throughput_gpu: no CUDA device, and the full size needs one; --toy runs on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: value for name in ("batch", "context", "new") if (value := getattr(options, name)) is not None}
    size = replace(TOY if options.toy else Size(), **given)
    rows = measured(size, device, options.caches.split(","), options.rounds)
    text = "\n".join(report(rows, size, device, options))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
        lines = (json.dumps({"cache": name, "size": vars(size), **row}) for name, row in rows.items())
        options.out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def measured(size: Size, device: torch.device, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Name of a cache -> its figures; one round that is not counted comes first, since it loads and compiles kernels."""
    model = build(size, device)
    drawn = torch.randint(
        size.vocabulary, (size.batch, size.context + size.new), generator=torch.Generator().manual_seed(0)
    )
    ids = drawn.to(device)
    states = prompt_states(model, ids[:, : size.context])
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    for turn in range(rounds + 1):
        for name in names:
            row = decoded(model, ids[:, size.context :], states, maker(name, model))
            if turn == 0:
                found[name] |= {"logits": row["logits"]}
            else:
                found[name]["seconds"].append(row["seconds"])
                found[name] |= {key: row[key] for key in ("bytes", "bits", "peak", "fill")}
    exact = found[PLAIN]["logits"] if PLAIN in found else None
    for row in found.values():
        logits = row.pop("logits")
        row["change"] = None if exact is None else ((logits - exact).norm() / exact.norm()).item()
    return found


def build(size: Size, device: torch.device) -> nn.Module:
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.blocks,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
        max_position_embeddings=max(8192, size.context + size.new), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt_states(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer; four sequences at a time, since the MLP's tokens would be the peak."""
    parts = []
    for some in ids.split(4):
        cache = DynamicCache(config=model.config)
        model.base_model(some, past_key_values=cache, use_cache=True)
        parts.append([(layer.keys, layer.values) for layer in cache.layers])
    return [
        (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
        for layer in zip(*parts, strict=True)
    ]


def maker(name: str, model: nn.Module) -> Callable[[], Any]:
    if name == PLAIN:
        return partial(DynamicCache, config=model.config)
    pair, mode = name.split()
    return partial(lw.QuantizedKVCache.uniform, *parse_pair(pair), model.config, mode=mode)


def decoded(
    model: nn.Module, ids: Tensor, states: list[tuple[Tensor, Tensor]], make: Callable[[], Any]
) -> dict[str, Any]:
    """One token a step, the same for every cache.

    seconds: median of a step. fill: seconds to take the prompt in. bytes, bits: held at the end. peak: bytes above what was allocated
    before the cache was made, its own among them, in decoding alone. logits: of the last step, float32.
    """
    device = ids.device
    before, cache = allocated(device), make()
    started = now(device)
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    fill = now(device) - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for position in range(ids.shape[1]):
        started = now(device)
        logits = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits
        seconds.append(now(device) - started)
    row = {
        "seconds": statistics.median(seconds),
        "fill": fill,
        "bytes": held(cache),
        "bits": cache.bits_per_element if isinstance(cache, lw.QuantizedKVCache) else 16.0,
        "peak": torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None,
        "logits": logits.float(),
    }
    del cache, logits
    gc.collect()
    return row


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def report(
    rows: dict[str, dict[str, Any]], size: Size, device: torch.device, options: argparse.Namespace
) -> Iterator[str]:
    yield f"# Decoding with a quantised KV cache on an accelerator{': the toy, no claim' if options.toy else ''}"
    yield ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"Machine: {name}; {machine()}. torch {torch.__version__}, layerwise {lw.__version__}."
    yield (
        f"Protocol: {size.blocks} blocks of {size.hidden}/{size.intermediate}, {size.heads} heads, {size.kv_heads} key/value heads,"
        f" random bfloat16 weights; {size.batch} x {size.new} tokens decoded after {size.context}, the median step, the median of"
        f" {options.rounds} rounds in turns (lowest-highest), one round before them not counted. Bits, MB: all that a cache holds at"
        " the end, measured. Peak: the most while decoding, the cache among it, above what was there before. Fill: taking the prompt in."
    )
    yield ""
    yield "| cache | bits | MB held | peak MB | step ms | tokens/s | times plain | fill ms | change of logits |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    plain = statistics.median(rows[PLAIN]["seconds"]) if PLAIN in rows else None
    for name, row in rows.items():
        step = statistics.median(row["seconds"])
        speeds = [size.batch / one for one in row["seconds"]]
        cells = [
            name,
            f"{row['bits']:.2f}",
            f"{row['bytes'] / 1e6:,.1f}",
            "-" if row["peak"] is None else f"{row['peak'] / 1e6:,.1f}",
            f"{1e3 * step:.2f}",
            f"{size.batch / step:,.1f} ({min(speeds):,.1f}-{max(speeds):,.1f})",
            "-" if plain is None else f"{plain / step:.2f}",
            f"{1e3 * row['fill']:.1f}",
            "-" if row["change"] is None else f"{row['change']:.4f}",
        ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
