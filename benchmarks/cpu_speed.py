"""Language models on a CPU: prefill and decode in float32, bfloat16 and int8, and what int8 costs in perplexity.

    python benchmarks/cpu_speed.py --bed FOLDER --work /tmp/cpu                # with torchao in the environment, its int8, too

int8 is `layerwise.int8_on_cpu`: inputs rounded at each call, no compiler. torchao's Int8DynamicActivationInt8WeightConfig is run as it is
and, with --compile, under torch.compile. A folder saved packed is not here: transformers unpacks it, so its times are those of its dtype.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

import layerwise as lw
from bed import Subject, add_arguments, perplexity, subjects
from lines import Lines
from measuring import machine

HERE = Path(__file__).parent
CONTEXT = 64  # tokens before those that are decoded


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="smollm2,demo")
    parser.add_argument("--prompts", default="16,256", help="tokens of a prefill: a short and a long one")
    parser.add_argument("--sizes", default="2048", help="square linears timed alone")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded, one by one")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens scored, windows of 256")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for each measurement")
    parser.add_argument(
        "--compile", action="store_true", help="torchao under torch.compile, too (needs a C++ compiler)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results/cpu_speed.md")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    before = f"{machine()}; {options.threads} thread(s); load average before the run {os.getloadavg()[0]:.1f}."
    lines = Lines(options.work / "cpu_speed.jsonl")
    for subject in subjects(options):
        dense = subject.load()
        for name, make in ways(options.compile):
            key = {"model": subject.name, "way": name, **protocol(options)}
            if key not in lines:
                lines.add(key, {**key, **measured(make(copy.deepcopy(dense)), subject, options)})
    for size in map(int, options.sizes.split(",")):
        for batch in (1, 16, 128):
            key = {"linear": size, "batch": batch, "threads": options.threads, "seconds": options.seconds}
            if key not in lines:
                lines.add(key, {**key, **one_linear(size, batch, options)})
    linears = lines.of(threads=options.threads, seconds=options.seconds)
    write(options, lines.of(**protocol(options)), [row for row in linears if "linear" in row], before)


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What rows of one table have in common."""
    return {name: getattr(options, name) for name in ("prompts", "new", "tokens", "threads", "seconds")}


def ways(compiled: bool) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """Name -> what makes the float32 model into what is timed."""
    yield "float32", lambda model: model
    yield "bfloat16", lambda model: model.bfloat16()
    yield "int8", lw.int8_on_cpu
    yield "int8 in bfloat16", lambda model: lw.int8_on_cpu(model.bfloat16())
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ModuleNotFoundError:
        return

    def torchao(model: nn.Module) -> nn.Module:
        quantize_(
            model,
            Int8DynamicActivationInt8WeightConfig(),
            filter_fn=lambda one, name: type(one) is nn.Linear and name != "lm_head",
        )
        return model

    yield "torchao int8", torchao
    if compiled:
        yield "torchao int8 compiled", lambda model: torch.compile(torchao(model))


def measured(model: nn.Module, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each prefill and of a decoded token, with the quartiles' distance; perplexity."""
    ids = torch.cat(subject.evaluation(options.tokens, 256))[None]
    row: dict[str, Any] = {}
    for prompt in map(int, options.prompts.split(",")):
        row[f"prefill {prompt}"] = timed(
            lambda length=prompt: model(input_ids=ids[:, :length], use_cache=True), options
        )
    cache = model(input_ids=ids[:, :CONTEXT], use_cache=True).past_key_values

    def decode() -> None:
        """The copy of the cache is timed, too: once for all tokens."""
        past = copy.deepcopy(cache)
        for at in range(CONTEXT, CONTEXT + options.new):
            model(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True)

    row["decode"] = [each / options.new for each in timed(decode, options)]
    return row | {"perplexity": perplexity(model, subject.evaluation(options.tokens, 256))}


def one_linear(size: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one linear of size x size on (batch, size); relative error of the int8 one."""
    torch.manual_seed(0)
    linear, x = nn.Linear(size, size, bias=False), torch.randn(batch, size)
    quick = lw.int8_on_cpu(nn.Sequential(copy.deepcopy(linear)))
    brain, x16 = copy.deepcopy(linear).bfloat16(), x.bfloat16()
    exact = linear(x)
    return {
        "float32": timed(lambda: linear(x), options),
        "bfloat16": timed(lambda: brain(x16), options),
        "int8": timed(lambda: quick(x), options),
        "error": float((quick(x) - exact).norm() / exact.norm()),
    }


def timed(run: Callable[[], object], options: argparse.Namespace) -> list[float]:
    """Milliseconds of one call: median and interquartile range, after a warm-up. torchao's tensors allow little else.

    Of the processor, so that other programs on the machine count for little: all threads together.
    """
    timer = Timer("run()", globals={"run": run}, num_threads=options.threads, timer=time.process_time)
    found = timer.blocked_autorange(min_run_time=options.seconds)
    return [1000 * found.median, 1000 * found.iqr]


def write(options: argparse.Namespace, rows: list[dict[str, Any]], linears: list[dict[str, Any]], before: str) -> None:
    """The tables, times beside those of float32; and all that was measured as JSON."""
    columns = [*(f"prefill {prompt}" for prompt in options.prompts.split(",")), "decode"]
    text = [
        "# int8 on a CPU",
        "",
        f"Machine: {before} layerwise {lw.__version__}, torch {torch.__version__}.",
        "",
        "Milliseconds of the processor at batch 1, median (interquartile range): prefill of so many tokens, and of one token decoded",
        f"after {CONTEXT}; × is how many times as fast as float32. Perplexity: {options.tokens:,} held-out tokens in windows of 256.",
        "",
        f"| model | way | {' | '.join(f'{column} | ×' for column in columns)} | perplexity |",
        f"|---|---|{'--:|' * (2 * len(columns) + 1)}",
    ]
    plain = {row["model"]: row for row in rows if row["way"] == "float32"}
    for row in rows:
        base = plain[row["model"]]
        cells = [f"{row[one][0]:.1f} ({row[one][1]:.1f}) | {base[one][0] / row[one][0]:.2f}" for one in columns]
        text.append(f"| {row['model']} | {row['way']} | {' | '.join(cells)} | {row['perplexity']:.3f} |")
    text += [
        "",
        "One linear alone, without a bias: milliseconds, and the relative error of int8.",
        "",
        "| size | batch | float32 | bfloat16 | int8 | error |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in linears:
        cells = " | ".join(f"{row[way][0]:.3f}" for way in ("float32", "bfloat16", "int8"))
        text.append(f"| {row['linear']} | {row['batch']} | {cells} | {row['error']:.2%} |")
    options.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    facts = {"machine": before, "runs": rows, "linears": linears}
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
