"""What zeros buy in time: every form of a pruned linear beside the dense one, and whole models through `layerwise.fastest`.

    python benchmarks/runtime.py                          # CPU, one thread, about ten minutes; --resume goes on after a kill
    python benchmarks/runtime.py --device cuda            # under a minute; writes runtime_cuda.md
    python benchmarks/runtime.py --quick --out /tmp/runtime.md

Weights are random, zeros in random blocks of the given shape, exact counts. Ratios are dense time over the form's time: below 1 is slower.
"""

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import layerwise as lw
from layerwise.randomness import generator_for
from layerwise.runtime.candidates import Candidates, for_matrix
from layerwise.runtime.outputs import layer_limit, relative_error
from layerwise.runtime.timing import CACHE, MARGIN, Timed, race
from layerwise.solvers.codes import Codes
from measuring import machine
from runtime_tables import BATCHES, break_even, could_not, layer_table, model_table

HERE = Path(__file__).parent
PATTERNS = {"1": (1, 1), "4x1": (4, 1), "16x16": (16, 16), "32x32": (32, 32), "rows": None, "2:4": None}
CODES = {"4 bits, groups of 128": (4, 128), "8 bits by row": (8, None)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--size", type=int, help="of the square linear; default 2048 on a CPU, 4096 on CUDA")
    parser.add_argument("--hidden", type=int, help="of the whole model; default 1024 on a CPU, 2048 on CUDA")
    parser.add_argument("--patterns", default="1,4x1,16x16,32x32,rows,2:4")
    parser.add_argument("--densities", default="0.05,0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--whole-densities", help="default 0.05,0.1,0.25,0.5; on CUDA 0.1,0.5")
    parser.add_argument("--seconds", type=float, help="of one race; default 0.4 on a CPU, 0.1 on CUDA")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from what is in the results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    parser.add_argument("--out", type=Path)
    options = defaults(parser.parse_args())
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Sparse")  # that they are in beta
    before = f"{machine()}; {options.threads} thread(s); load average before the run {os.getloadavg()[0]:.1f}."
    if options.device == "cuda":
        before = f"{torch.cuda.get_device_name()}; {before}"
    started = time.perf_counter()
    layers, models, coded = [], [], []
    if options.resume:
        found = measured_before(options)
        layers, models, coded = (found.get(name, []) for name in ("layers", "models", "coded"))
        if found["machine"].partition(";")[0] != before.partition(";")[0]:
            before = f"{found['machine']} Later cases (see the .json for their order): {before}"
    for pattern, density in cases(options, options.densities):
        for batch in BATCHES:
            if (pattern, density, batch) not in map(key, layers):
                layers.append(one_layer(pattern, density, batch, options))
    for name, batch in ((name, batch) for name in CODES for batch in BATCHES):
        if (name, 1.0, batch) not in map(key, coded):
            coded.append(one_coded(name, batch, options))
    write(options, layers, models, coded, before)
    dense = llama(options)
    for pattern, density in cases(options, options.whole_densities):
        if (pattern, density, BATCHES[-1]) not in map(key, models):
            models += whole_model(pattern, density, dense, options)
            write(options, layers, models, coded, before)
    print(options.out.read_text(encoding="utf-8"))
    print(f"{time.perf_counter() - started:.0f} s")


def key(row: dict[str, Any]) -> tuple[str, float, int]:
    """Which case a row is of."""
    return row["pattern"], row["density"], row["batch"]


def measured_before(options: argparse.Namespace) -> dict[str, Any]:
    """What a run that was stopped left: machine, linears, models, linears of codes, of the same protocol."""
    found: dict[str, Any] = json.loads(options.out.with_suffix(".json").read_text(encoding="utf-8"))
    if found["protocol"] != protocol(options):
        raise SystemExit(f"{options.out}: measured with {found['protocol']}, not {protocol(options)}.")
    return found


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What rows of one table have in common."""
    names = ("device", "size", "hidden", "seconds", "threads")
    return {name: getattr(options, name) for name in names} | {"dtype": str(options.dtype), "torch": torch.__version__}


def defaults(options: argparse.Namespace) -> argparse.Namespace:
    """What depends on the device."""
    cuda = options.device == "cuda"
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    options.size = options.size or (4096 if cuda else 2048)
    options.hidden = options.hidden or (2048 if cuda else 1024)
    options.seconds = options.seconds or (0.1 if cuda else 0.4)
    options.whole_densities = options.whole_densities or ("0.1,0.5" if cuda else "0.05,0.1,0.25,0.5")
    if options.quick:
        options.size, options.hidden, options.seconds = 128, 64, 0.002
        options.densities = options.whole_densities = "0.1,0.5"
    for name in ("densities", "whole_densities"):
        setattr(options, name, [float(one) for one in getattr(options, name).split(",")])
    options.patterns = options.patterns.split(",")
    options.out = options.out or HERE / f"results/runtime{'_cuda' if cuda else ''}.md"
    return options


def cases(options: argparse.Namespace, densities: list[float]) -> list[tuple[str, float]]:
    """(pattern, density); 2:4 has one density."""
    return [
        (pattern, density) for pattern in options.patterns for density in ([0.5] if pattern == "2:4" else densities)
    ]


def mask(rows: int, columns: int, pattern: str, density: float, name: str, device: str) -> Tensor:
    """(rows, columns) bool, exactly round(density * blocks) random blocks kept. rows: whole rows; 2:4: two of each four inputs."""
    seed = generator_for(0, name).initial_seed()
    draw = torch.Generator(device).manual_seed(seed)  # on the device: millions of them take seconds on a CPU
    if pattern == "2:4":
        order = torch.rand(rows, columns // 4, 4, generator=draw, device=device).argsort(-1)
        return (order < 2).reshape(rows, columns)
    height, width = PATTERNS[pattern] or (1, columns)
    down, across = -(-rows // height), -(-columns // width)
    kept = torch.zeros(down * across, dtype=torch.bool, device=device)
    kept[torch.randperm(down * across, generator=draw, device=device)[: round(density * down * across)]] = True
    whole = kept.reshape(down, across).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return whole[:rows, :columns]


def one_layer(pattern: str, density: float, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of every form that this matrix can have; the weights come from memory as in a large model."""
    size = options.size
    name = f"{pattern} {density}"
    weight = torch.randn(size, size, generator=generator_for(1, name)) / size**0.5
    weight = weight.to(options.device) * mask(size, size, pattern, density, name, options.device)
    weight = weight.to(options.dtype)
    x = torch.randn(batch, size, generator=generator_for(2, name)).to(options.device, options.dtype)
    case = {"pattern": pattern, "density": density, "batch": batch}
    return case | beside_dense(for_matrix(weight, None), weight, x, options)


def one_coded(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same for weights that are codes, in bfloat16, where the kernels are; on a CPU int8 with rounded inputs, too."""
    bits, group = CODES[name]
    size, draw = options.size, generator_for(0, name)
    scale = ((torch.rand(size, size // (group or size), generator=draw) + 0.5) / size**0.5).bfloat16().float()
    codes = Codes(
        torch.randint(2**bits, (size, size), generator=draw).to(torch.uint8),
        scale,
        torch.full_like(scale, 2 ** (bits - 1)),
        bits,
        group,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )
    weight = codes.weight().to(options.device, torch.bfloat16)
    x = torch.randn(batch, size, generator=draw).to(options.device, torch.bfloat16)
    found = for_matrix(weight, None, codes=codes, rounding=options.device == "cpu")
    return {"pattern": name, "density": 1.0, "batch": batch} | beside_dense(found, weight, x, options)


def beside_dense(found: Candidates, weight: Tensor, x: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Times of all forms that run here and equal the dense product; and why the others do not."""
    runs, failed = {"dense": partial(torch.nn.functional.linear, x, weight)}, dict(found.refused)
    for form, build in found.builds.items():
        try:
            made = build()
            if (error := relative_error(made(x), runs["dense"]())) > layer_limit(form, weight.dtype):
                raise ArithmeticError(f"outputs differ by {error:.2g}")
            runs[form] = partial(made, x)
        except Exception as error:  # a kernel that refuses is a result
            first = next(iter(str(error).splitlines()), "")
            failed[form] = f"{type(error).__name__}: {first[:100]}"
    times = race(runs, seconds=options.seconds, others=CACHE if options.device == "cpu" else 0, to_the_end=True)
    return {
        "dense_ms": times["dense"].ms,
        "ratios": {form: timed.ratio for form, timed in times.items() if form != "dense"},
        "low": {form: timed.low for form, timed in times.items() if form != "dense"},
        "chosen": chosen(times),
        "failed": failed,
    }


def chosen(times: dict[str, Timed]) -> str:
    """What `fastest` would take."""
    winners = [form for form in times if form != "dense" and times[form].faster()]
    return max(winners, key=lambda form: times[form].ratio, default="dense")


def whole_model(
    pattern: str, density: float, dense: nn.Module, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One forward pass of `batch` sequences of one token through a random Llama, all linears of its blocks pruned."""
    model = copy.deepcopy(dense)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            kept = mask(*module.weight.shape, pattern, density, f"{name} {pattern} {density}", options.device)
            module.weight.mul_(kept)
    for batch in BATCHES:
        _, report = lw.fastest(model, batch=batch, seconds=options.seconds / 4)
        yield {
            "pattern": pattern,
            "density": density,
            "batch": batch,
            "forms": report.forms,
            "dense_ms": report.dense_ms,
            "ratio": report.ratio,
            "low": report.low,
            "error": report.error,
            "why": report.why,
            "bytes": report.bytes,
        }


def llama(options: argparse.Namespace) -> nn.Module:
    hidden = options.hidden
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=2, num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 64 or 1, vocab_size=1024, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(options.device, options.dtype)


def write(
    options: argparse.Namespace,
    layers: list[dict[str, Any]],
    models: list[dict[str, Any]],
    coded: list[dict[str, Any]],
    before: str,
) -> None:
    """The tables, and all that was measured as JSON."""
    dtype = str(options.dtype).removeprefix("torch.")
    text = [
        f"# What zeros buy in time ({options.device})",
        "",
        f"Machine: {before} layerwise {lw.__version__}, torch {torch.__version__}, {dtype}.",
        "",
        "Ratios are dense time over the form's: 2 is twice as fast, below 1 slower. Ways take turns for nine rounds; the ratio is the",
        f"median over rounds. Bold is what `fastest` takes: more than {MARGIN:.0%} faster, and faster in three rounds of four. Patterns:",
        "blocks of rows x columns at random, `rows` whole rows. On a CPU other memory is read before each call, so that weights do not",
        "come from the cache.",
        "",
        *break_even(layers),
        "",
        f"## One linear of {options.size} x {options.size}",
        "",
        *layer_table(layers),
        *could_not([*layers, *coded]),
        "",
        "## The same, of codes",
        "",
        "bfloat16, no zeros. `int4 weights` and `int8 weights` give the product of the same weights; `int8` rounds its inputs too.",
        "",
        *layer_table(coded),
        "",
        "## A whole model",
        "",
        f"Llama of two blocks, hidden size {options.hidden}, all linears of its blocks pruned; one forward pass of `batch` sequences of one"
        " token.",
        "Attention, norms and the dense head (1024 words) are in the time. `dense`: the whole was not faster, so nothing was replaced.",
        "",
        *model_table(
            sorted(models, key=lambda row: (list(PATTERNS).index(row["pattern"]), row["density"], row["batch"]))
        ),
    ]
    options.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    facts = {"machine": before, "protocol": protocol(options), "layers": layers, "models": models, "coded": coded}
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
