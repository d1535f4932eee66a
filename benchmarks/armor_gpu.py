"""ARMOR on one block of a Llama-2-7B-shaped model: seconds per layer, and the speed of the module it leaves beside dense and plain 2:4.

    python benchmarks/armor_gpu.py --out benchmarks/results/armor_gpu.md
    python benchmarks/armor_gpu.py --toy            # the same code on a toy, on any machine

Weights and the powers of the inputs are random (a low-rank part, outliers, columns of unequal size): speed hardly depends on them, quality
is not judged here. Layers are timed one after another, after one small layer that warms up every kernel. The module is timed in bfloat16 by
CUDA graphs, so that launching kernels costs none of the three anything; and by plain calls beside it.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

import layerwise as lw
from layerwise.io import ArmorLinear
from layerwise.passes import InputStatistics
from layerwise.plan import Factorize
from layerwise.solvers import ARMOR, Factors
from measuring import machine


@dataclass(frozen=True)
class Size:
    """Shapes of one block, block side of the factors, rows of input that the module is timed on."""

    hidden: int = 4096
    intermediate: int = 11008
    block: int = 128
    iterations: int = 100
    rows: tuple[int, ...] = (1, 16, 256)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Role -> (outputs, inputs)."""
        square = (self.hidden, self.hidden)
        wide = (self.intermediate, self.hidden)
        return {**dict.fromkeys(("q", "k", "v", "o"), square), "gate": wide, "up": wide, "down": wide[::-1]}


TOY = Size(hidden=128, intermediate=256, block=32, iterations=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy size, on the CPU where there is no CUDA")
    parser.add_argument("--block", type=int, help="side of the diagonal blocks (default: 128)")
    parser.add_argument("--iterations", type=int, help="of the fit (default: 100)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("armor_gpu: no CUDA device, and the full size needs one; --toy runs the same code on the CPU.")
    size = TOY if options.toy else Size()
    given = {"block": options.block, "iterations": options.iterations}
    size = Size(**{**size.__dict__, **{name: value for name, value in given.items() if value}})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for line in report(size, device):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(size: Size, device: torch.device) -> Iterator[str]:
    started = time.perf_counter()
    yield from ["# ARMOR on one 7B-shaped block" if size.hidden == 4096 else "# The toy: no claim", ""]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"Machine: {name}; {machine()}. torch {torch.__version__}, layerwise {lw.__version__}."
    yield (
        f"Protocol: random weights in bfloat16, {size.hidden}/{size.intermediate}; 2:4 cores, blocks of {size.block}, at most"
        f" {size.iterations} iterations, fitted in float32, stored in bfloat16; one run a layer after one warm-up layer. loss: of the"
        " normalised weight weighed by the inputs' powers, over that of a zero weight."
    )
    yield ""
    solve(drawn(TOY.layers["gate"], device, 0), Size(block=32, iterations=3))  # kernels are loaded once
    yield "| layer | outputs x inputs | seconds | iterations | loss NoWag-P | loss ARMOR | Adam form, as long | bits per weight | peak GB |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    made: dict[str, tuple[Tensor, Factors]] = {}
    for index, (role, shape) in enumerate(size.layers.items()):
        weight = drawn(shape, device, index)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found = solve(weight, size)
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "-"
        other = f"{adam(weight, size, found.seconds):.4f}" if role in ("q", "gate") else "-"
        yield (
            f"| {role} | {shape[0]} x {shape[1]} | {found.seconds:.2f} | {found.iterations} | {found.first:.4f} | {found.last:.4f}"
            f" | {other} | {found.factors.bits_per_weight:.3f} | {peak} |"
        )
        if role in ("q", "gate", "down"):
            made[role] = weight, found.factors
    yield from ["", *speeds(made, size, device), "", f"All in {time.perf_counter() - started:.0f} s."]


def drawn(shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """A bfloat16 weight with a low-rank part, outliers and columns of unequal size, of about the size that trained weights have."""
    stream = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=stream)

    weight = normal(*shape) * torch.exp(0.3 * normal(shape[1]))
    weight += normal(shape[0], 16) @ normal(16, shape[1]) / 8
    weight += normal(*shape) * 4 * (torch.rand(shape, device=device, generator=stream) < 0.005)
    return (weight * 0.02).bfloat16()


@dataclass(frozen=True)
class Found:
    factors: Factors
    seconds: float
    iterations: int
    first: float
    last: float


def solve(weight: Tensor, size: Size) -> Found:
    """The whole solver: normalisation, fit, folding, rounding, fitting the core again."""
    kept = _Remembered(iterations=size.iterations, storage="bfloat16")
    wide, inputs = weight.float(), statistics(weight)
    synchronize(weight.device)
    started = time.perf_counter()
    (solved,) = kept.solve([wide], inputs, [Factorize(block=size.block)], [torch.Generator().manual_seed(0)])
    synchronize(weight.device)
    seconds = time.perf_counter() - started
    losses = kept.losses
    assert solved.factors is not None
    return Found(solved.factors, seconds, len(losses) - 1, losses[0], min(losses))


class _Remembered(ARMOR):
    """The solver, with the losses of its last fit."""

    def fit(self, target, generator):  # type: ignore[no-untyped-def]
        found = super().fit(target, generator)
        object.__setattr__(self, "losses", found.losses)
        return found


def adam(weight: Tensor, size: Size, seconds: float) -> float:
    """The least loss of the published Adam form within as many seconds."""
    from layerwise.solvers.armor_fit import adam as going
    from layerwise.solvers.armor_state import Target, start
    from layerwise.solvers.nowag import normalise, power_of
    from layerwise.solvers.select import keep_nm

    power, _ = power_of(statistics(weight))
    target = Target(normalise(weight.float()).weight, power, size.block, 2, 4)
    state = start(target, keep_nm(target.weight.square() * power, 2, 4))
    least, total = float("inf"), float(target.total)
    synchronize(weight.device)
    started = time.perf_counter()
    for now in going(target, state, 1e-4, torch.Generator().manual_seed(0)):
        least = min(least, float(now) / total)
        if time.perf_counter() - started > seconds:
            return least
    return least


def statistics(weight: Tensor) -> InputStatistics:
    stream = torch.Generator(weight.device).manual_seed(7)
    squares = torch.exp(torch.randn(weight.shape[1], device=weight.device, generator=stream))
    return InputStatistics(1024, squares * 1024)


@torch.no_grad()
def speeds(made: dict[str, tuple[Tensor, Factors]], size: Size, device: torch.device) -> Iterator[str]:
    """Each layer as it was, by the plain 2:4 core alone, and in factors."""
    yield "One layer in bfloat16, µs, median of repeated calls; times faster than dense in brackets:"
    yield ""
    yield "| layer | rows | dense | plain 2:4 | ARMOR | dense, plain calls | plain 2:4 | ARMOR | kernel | relative error |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|"
    for role, (weight, factors) in made.items():
        module = ArmorLinear(factors).eval()
        core, kernel = module._core()
        for rows in size.rows:
            inputs = torch.randn(rows, weight.shape[1], device=device, dtype=torch.bfloat16)
            wanted = linear(inputs.float(), factors.weight())
            error = ((module(inputs).float() - wanted).norm() / wanted.norm()).item()
            calls = [
                lambda x=inputs, w=weight: linear(x, w),
                lambda x=inputs, w=core: linear(x, w),
                lambda x=inputs, f=module: f(x),
            ]
            graphed, plain = ([way(call) for call in calls] for way in (replayed, microseconds))
            yield f"| {role} | {rows} | {cells(graphed)} | {cells(plain)} | {kernel} | {error:.2g} |"


def cells(times: list[float | None]) -> str:
    first = times[0]
    return " | ".join(
        "-" if one is None else f"{one:.1f}" if one is first or first is None else f"{one:.1f} ({first / one:.2f})"
        for one in times
    )


def replayed(call: Callable[[], Tensor]) -> float | None:
    """µs of one call inside a CUDA graph of 20; None without CUDA, or where a kernel cannot be captured."""
    if not torch.cuda.is_available():
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return microseconds(graph.replay) / 20


def microseconds(call: Callable[[], object]) -> float:
    least = 0.3 if torch.cuda.is_available() else 0.02  # seconds; on the CPU it is only tried out
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=least).median * 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
