"""Several ways to compute one thing, timed side by side on a machine that has other work too.

Ways take turns: in every round each is timed once, in rotating order, and compared with the dense one of the same round. What slows the
machine for a while slows both; the median over rounds forgets a stroke of bad luck.

A layer called again and again finds its weights in the cache, which in a model other layers have filled meanwhile. On CPUs as much
memory as the model has is therefore read before each call: otherwise dense weights that fit the cache would look better than they are.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer as wall  # waits for the accelerator first

ROUNDS = 9
CALLS = 5  # at most in one turn, where the cache is emptied before each
SHORTEST = 5e-4  # seconds of one turn, where it is not: many calls where one is shorter
PATIENCE = 20
HOPELESS = 1.5  # after two rounds, a way that takes this times as long as the best is out of the race
MARGIN = 0.05  # how much faster than dense the median must be, to be called faster
CACHE = 2**26  # bytes: no cache that a core has to itself is larger

Run = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one call, median over rounds; ratios: dense over this way, one for each round."""

    ms: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast as dense: the median over rounds."""
        return statistics.median(self.ratios)

    @property
    def low(self) -> float:
        """The lower quartile: three rounds in four were better."""
        return sorted(self.ratios)[len(self.ratios) // 4]

    def faster(self, margin: float = MARGIN) -> bool:
        """By more than the margin, and not only by luck: in three rounds of four at all."""
        return self.ratio >= 1 + margin and self.low > 1


def race(
    ways: Mapping[str, Run], *, seconds: float, others: int = 0, first: str = "dense", to_the_end: bool = False
) -> dict[str, Timed]:
    """Name -> times; `first` is the way that the others are compared with. seconds: about what the rounds take together. Where single
    calls are so slow that they would take more than PATIENCE times that, there are fewer rounds, but three at least.

    others: bytes that the model reads between two calls, 0 where the ways are the whole of it; for CPUs.
    With one thread on a CPU the clock is the processor's, which others on the machine do not move; otherwise the wall's.
    """
    clock = time.process_time if _alone() else wall
    between = torch.ones(min(others, CACHE) // 4) if others else None
    with _no_collection():
        for run in ways.values():  # the first call of a way may compile, allocate or choose a kernel
            run()
        once = {name: _time(run, 1, clock, between) for name, run in ways.items()}
        share = max(SHORTEST, seconds / ROUNDS / len(ways))
        rounds = max(3, min(ROUNDS, int(PATIENCE * seconds / max(1e-9, sum(once.values())))))
        times: dict[str, list[float]] = {name: [] for name in ways}
        racing = list(ways)
        for turn in range(rounds):
            start = turn % len(racing)
            for name in racing[start:] + racing[:start]:
                calls = max(1, round(share / max(once[name], 1e-7)))
                times[name].append(_time(ways[name], calls, clock, between))
            if turn == 1 and not to_the_end:
                best = min(min(of) for of in times.values())
                racing = [name for name in racing if name == first or min(times[name]) < HOPELESS * best]
    base = times[first]
    return {
        name: Timed(1e3 * statistics.median(of), tuple(dense / own for dense, own in zip(base, of, strict=False)))
        for name, of in times.items()
    }


def _time(run: Run, calls: int, clock: Callable[[], float], between: Tensor | None) -> float:
    """Seconds of one call: of many in a row; or the median of a few, each after other memory has been read."""
    if between is None:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls
    times = []
    for _ in range(min(calls, CALLS)):
        between.sum()
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _alone() -> bool:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_num_threads() == 1 and not cuda
